"""How near a recipe's output and gradients are to fp32, in dB: `python -m tlm.lowbit.sqnr` prints a table, beside
torchao's emulated float8 training on the same numbers where that is installed.

20 dB are an error of a tenth, 40 dB of a hundredth of the result. Inputs are normal with a few columns ten times as
large, as activations of Transformers have; gradients are normal with rows of very different size.
"""

import importlib.util
from collections import Counter
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from tlm.lowbit.linear import Products
from tlm.lowbit.recipes import RECIPES

SHAPES = ((2048, 256, 768), (2048, 512, 256), (1000, 200, 300))  # rows, inputs, outputs


def sqnr_db(exact: torch.Tensor, near: torch.Tensor) -> float:
    """Power of the signal over that of the error."""
    exact, near = exact.detach().double(), near.detach().double()
    return float(10 * torch.log10(exact.square().sum() / (exact - near).square().sum()))


def operands(rows: int, inputs: int, outputs: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x [N, K], w [O, K], the output's gradient [N, O]."""
    generator = torch.Generator().manual_seed(seed)
    x, w, g = (torch.randn(s, generator=generator) for s in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    x[:, ::50] *= 10
    return x, w / inputs**0.5, g * 10 ** (torch.rand((rows, 1), generator=generator) * 3 - 6)


def of_recipe(name: str, x: torch.Tensor, w: torch.Tensor, g: torch.Tensor) -> dict[str, float]:
    """dB of the three products of a Linear beside fp32."""

    seed = 0 if RECIPES[name].stochastic else None
    return beside_fp32(lambda x, w: Products.apply(x, w, RECIPES[name], seed, Counter()), x, w, g)


def of_torchao(name: str, x: torch.Tensor, w: torch.Tensor, g: torch.Tensor) -> dict[str, float]:
    """The same of torchao's recipe "tensorwise", or "rowwise": that has e4m3 gradients and powers of two for scales."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    holder = nn.Sequential(nn.Linear(w.shape[1], w.shape[0], bias=False))
    convert_to_float8_training(holder, config=replace(Float8LinearConfig.from_recipe_name(name), emulate=True))
    return beside_fp32(lambda x, w: torch.func.functional_call(holder[0], {"weight": w}, (x,)), x, w, g)


def beside_fp32(function, x: torch.Tensor, w: torch.Tensor, g: torch.Tensor) -> dict[str, float]:
    def products(function):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, g)

    names = ("output", "input gradient", "weight gradient")
    return {n: sqnr_db(a, b) for n, a, b in zip(names, products(F.linear), products(function), strict=True)}


def main() -> None:
    for shape in SHAPES:
        print("rows x inputs x outputs:", " x ".join(map(str, shape)))
        found = {name: of_recipe(name, *operands(*shape)) for name in RECIPES}
        if importlib.util.find_spec("torchao"):
            found |= {f"torchao {name}": of_torchao(name, *operands(*shape)) for name in ("tensorwise", "rowwise")}
        for name, values in found.items():
            print(f"  {name:18}", "  ".join(f"{k} {v:5.1f}" for k, v in values.items()))


if __name__ == "__main__":
    main()
