"""A Linear whose three products read numbers of 8 bits and fewer, by a recipe. Legend: N rows, K inputs, O outputs.

Products of quantised numbers are float32 products of what these stand for: no rounding but float32's comes in between
(torch._scaled_mm gives the same to 1e-7 for two of the recipes, at half the speed on a CPU).
"""

from collections import Counter

import torch
from torch import nn

from tlm.lowbit.delayed import Largest
from tlm.lowbit.philox import uniforms
from tlm.lowbit.quantise import TINY, Quantised
from tlm.lowbit.recipes import RECIPES, Recipe


class Linear(nn.Linear):
    """nn.Linear's parameters, by its names. `odd` counts what no scale fits ("input zero blocks", "weight infinite",
    "gradient NaN" and so on) over all outputs and input gradients."""

    def __init__(self, inputs: int, outputs: int, bias: bool, recipe: str):
        super().__init__(inputs, outputs, bias)
        self.recipe = recipe
        self.odd: Counter[str] = Counter()
        self.largest = Largest() if RECIPES[recipe].delayed else None

    def forward(self, x: torch.Tensor, before: str = "plain", norm: nn.Module | None = None) -> torch.Tensor:
        """[..., K] -> [..., O]. Where gradients are rounded stochastically, the seed comes from torch's generator: the
        trainer sets it at every step, and activation checkpointing sets it back. `before`: what kernels take in that
        stands before it (`takes_in`), of x as it is before that: "norm", or "geglu" of [..., 2 K]."""
        recipe, rows = RECIPES[self.recipe], x.reshape(-1, x.shape[-1])
        if has_kernels(x.device):
            from tlm.lowbit.kernels.linear import Products as Kernels

            weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
            out = Kernels.apply(before, rows, self.weight, weight, eps, recipe, self.odd, torch.is_grad_enabled())
        else:
            if self.largest and self.training:
                recipe = self.largest.bound(recipe)
            seed = int(torch.randint(2**62, ())) if recipe.stochastic and torch.is_grad_enabled() else None
            out = Products.apply(rows, self.weight, recipe, seed, self.odd)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe}"


def has_kernels(device: torch.device) -> bool:
    """Whether products there are those of tlm/lowbit/kernels; `check` has seen to it that they can be."""
    return device.type == "cuda"


def takes_in(linear: nn.Module, device: torch.device, norm: nn.Module | None = None) -> bool:
    """Whether `linear` computes what stands before it, too. ZeRO 3 holds a norm's weight ready for the norm alone."""
    return isinstance(linear, Linear) and has_kernels(device) and not hasattr(getattr(norm, "weight", None), "ds_id")


def after_norm(norm: nn.Module, linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """linear(norm(x)), x: [..., K]; `norm` is a LayerNorm without bias, or an nn.Identity."""
    if isinstance(norm, nn.Identity) or not takes_in(linear, x.device, norm):
        return linear(norm(x))
    return linear(x, "norm", norm)


class Products(torch.autograd.Function):
    """Twin of kernels/linear.py."""

    @staticmethod
    def forward(ctx, x_NK: torch.Tensor, w_OK: torch.Tensor, recipe: Recipe, seed: int | None, odd: Counter):
        ctx.save_for_backward(x_NK, w_OK)
        ctx.recipe, ctx.seed, ctx.odd = recipe, seed, odd
        x, w = recipe.inputs(x_NK), recipe.weight(w_OK)
        count(odd, "input", x_NK, x)
        count(odd, "weight", w_OK, w)
        return product(x, w)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_NO: torch.Tensor):
        (x_NK, w_OK), recipe = ctx.saved_tensors, ctx.recipe
        to_x = to_w = None
        if recipe.gradient is None:
            if ctx.needs_input_grad[0]:
                to_x = g_NO @ recipe.weight(w_OK).dequantised()
            if ctx.needs_input_grad[1]:
                to_w = g_NO.T @ recipe.inputs(x_NK).dequantised()
            return to_x, to_w, None, None, None
        noise = None if ctx.seed is None else uniforms(ctx.seed, g_NO.shape, g_NO.device)
        if ctx.needs_input_grad[0]:
            g = recipe.gradient(g_NO, noise)
            count(ctx.odd, "gradient", g_NO, g)
            to_x = product(g, recipe.weight(w_OK.T))
        if ctx.needs_input_grad[1]:
            to_w = product(recipe.gradient(g_NO.T, None if noise is None else noise.T), recipe.inputs(x_NK.T))
        return to_x, to_w, None, None, None


def product(a: Quantised, b: Quantised) -> torch.Tensor:
    """[M, L], [P, L] -> float32 [M, P]."""
    return a.dequantised() @ b.dequantised().T


def count(odd: Counter, operand: str, x: torch.Tensor, quantised: Quantised) -> None:
    """Blocks of zeros (or of numbers too small for a scale), and what is no finite number."""
    if zeros := int((quantised.scales == TINY).sum()):
        odd[f"{operand} zero blocks"] += zeros
    if bool(quantised.scales.isnan().any()):
        odd[f"{operand} infinite"] += int(x.isinf().sum())
        odd[f"{operand} NaN"] += int(x.isnan().sum())
