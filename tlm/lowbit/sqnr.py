"""How near a recipe's output and gradients are to fp32, in dB: `python -m tlm.lowbit.sqnr` prints a table.

20 dB are an error of a tenth, 40 dB of a hundredth of the result. Inputs are normal with a few columns ten times as
large, as activations of Transformers have; gradients are normal with rows of very different size.
"""

from collections import Counter

import torch
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

    def products(function):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, g)

    seed = 0 if RECIPES[name].stochastic else None
    near = products(lambda x, w: Products.apply(x, w, RECIPES[name], seed, Counter()))
    names = ("output", "input gradient", "weight gradient")
    return {n: sqnr_db(a, b) for n, a, b in zip(names, products(F.linear), near, strict=True)}


def main() -> None:
    for shape in SHAPES:
        print("rows x inputs x outputs:", " x ".join(map(str, shape)))
        for name in RECIPES:
            print(f"  {name:15}", "  ".join(f"{k} {v:5.1f}" for k, v in of_recipe(name, *operands(*shape)).items()))


if __name__ == "__main__":
    main()
