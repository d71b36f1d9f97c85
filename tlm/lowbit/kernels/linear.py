"""The three products of a Linear on a GPU, by a recipe of fp8. Twin: `Products` in tlm/lowbit/linear.py.

What the backward pass reads is quantised in the forward pass, while the numbers are at hand, and kept in 8 bits: the
transposes of inputs and weights. What comes before may be taken in, a norm or a GeGLU, whose result is then never
written. Legend: N rows, K inputs, O outputs.
"""

from collections import Counter

import torch
from torch.nn import functional as F

from tlm.lowbit.kernels.matmul import product
from tlm.lowbit.kernels.quantise import Gated, Normed, Plain, quantise
from tlm.lowbit.quantise import Quantised
from tlm.lowbit.recipes import Recipe


class Products(torch.autograd.Function):
    """x: [N, K]; of kind "norm" with the norm's weight [K] and eps, of kind "geglu" [N, 2 K]. w: [O, K]. `grad`: if a
    backward pass may come, which torch does not tell inside. The output is in autocast's type, or else float32."""

    @staticmethod
    def forward(ctx, kind: str, x, w_OK, norm_weight, eps: float, recipe: Recipe, odd: Counter, grad: bool):
        source = {"plain": Plain, "norm": lambda x: Normed.of(x, norm_weight, eps), "geglu": Gated}[kind](x)
        _, needs_x, needs_w, needs_norm, *_ = ctx.needs_input_grad
        inputs, inputs_turned = quantise(source, recipe.inputs, grad and needs_w, counters(odd, "input", x.device))
        weight, weight_turned = quantise(
            Plain(w_OK), recipe.weight, grad and (needs_x or needs_norm), counters(odd, "weight", x.device)
        )
        kept = None if kind == "plain" else x
        stats = (source.mean, source.rstd) if kind == "norm" else (None, None)
        ctx.save_for_backward(*parts(inputs_turned), *parts(weight_turned), kept, norm_weight, *stats)
        ctx.kind, ctx.recipe, ctx.odd, ctx.dtype = kind, recipe, odd, x.dtype
        device = x.device.type
        return product(
            inputs, weight, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_NO: torch.Tensor):
        x_values, x_scales, w_values, w_scales, x, norm_weight, mean, rstd = ctx.saved_tensors
        recipe, to_x, to_w, to_norm = ctx.recipe, None, None, None
        odd = None if w_values is None else counters(ctx.odd, "gradient", g_NO.device)
        g, g_turned = quantise(Plain(g_NO), recipe.gradient, x_values is not None, odd)
        if w_values is not None:
            to_x = product(g, Quantised(w_values, w_scales, recipe.weight.block), ctx.dtype)
        if x_values is not None:
            to_w = product(g_turned, Quantised(x_values, x_scales, recipe.inputs.block))
        if to_x is not None and ctx.kind == "norm":
            to_x, to_norm, _ = torch.ops.aten.native_layer_norm_backward(
                to_x, x, x.shape[1:], mean[:, None], rstd[:, None], norm_weight.to(x.dtype), None, [True, True, False]
            )
        elif to_x is not None and ctx.kind == "geglu":
            value, gate = x.chunk(2, -1)
            to_x = torch.cat([torch.ops.aten.gelu_backward(to_x * gate, value), to_x * F.gelu(value)], -1)
        return None, to_x, to_w, to_norm, None, None, None, None


def parts(quantised: Quantised | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None, None) if quantised is None else (quantised.values, quantised.scales)


def counters(odd: Counter, operand: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of blocks that no scale fits, on the GPU: to read them here would wait for it."""
    names = f"{operand} zero blocks", f"{operand} blocks not finite"
    for name in names:
        if name not in odd:
            odd[name] = torch.zeros((), dtype=torch.int64, device=device)
    return odd[names[0]], odd[names[1]]
