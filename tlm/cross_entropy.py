"""Masked-LM loss from hidden states, without the logits of all positions ever existing at once.

The product with the vocabulary, the softmax and both gradients are made a block of rows at a time, while the block is
in the cache (the idea of Liger Kernel, Hsu et al. 2024, arXiv 2410.10989, and of Cut Cross-Entropy, Wijmans et al.
2024, arXiv 2411.09009). `cross_entropy_sum` on the model's logits is the slow twin.
"""

from contextlib import nullcontext

import torch
from torch.nn import functional as F

BLOCK_ELEMENTS = 2**20  # logits a block: 4 MB


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """In float32 at least, whatever the model computes in."""
    return F.cross_entropy(logits.to(exact(logits.dtype)), targets, reduction="sum")


def linear_cross_entropy_sum(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Sum over M rows of -log softmax(hidden @ weight.T + bias)[target], in float32 at least.

    hidden: [M, D], weight: [V, D], bias: [V], targets: int64[M]; rows of hidden beyond the targets do not count.
    """
    return LinearCrossEntropy.apply(hidden, weight, bias, targets)


class LinearCrossEntropy(torch.autograd.Function):
    """The gradients are made with the loss, for the sum's own gradient is one number, by which they are multiplied."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        device = hidden.device.type
        rounds = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if rounds else nullcontext():
            dtype = torch.get_autocast_dtype(device) if rounds else hidden.dtype
            return LinearCrossEntropy.in_blocks(ctx, hidden, weight, bias, targets, dtype)

    @staticmethod
    def in_blocks(ctx, hidden, weight, bias, targets, dtype):
        """`dtype` is what products read; they are summed and kept in the tensors' own."""
        total = torch.zeros((), dtype=exact(dtype), device=hidden.device)
        to_hidden, to_bias = torch.empty_like(hidden), torch.zeros_like(bias)
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # embeddings may be frozen
        rounded, wanted = weight.to(dtype), any(ctx.needs_input_grad)
        rows = max(1, BLOCK_ELEMENTS // len(weight))
        for begin in range(0, len(hidden), rows):
            block = slice(begin, begin + rows)
            h, target = hidden[block].to(dtype), targets[block]
            log_p = torch.log_softmax(torch.addmm(bias.to(dtype), h, rounded.T).to(total.dtype), -1)
            at = (torch.arange(len(target), device=target.device), target)
            total -= log_p[at].sum()
            if wanted:  # the logits' gradient: probabilities, less one at the target
                to_logits = log_p.exp_()
                to_logits[at] -= 1
                to_logits[len(target) :] = 0
                to_bias += to_logits.sum(0)
                to_logits = to_logits.to(dtype)
                to_hidden[block] = to_logits @ rounded
                if to_weight is None:
                    continue
                if dtype == weight.dtype:
                    to_weight.addmm_(to_logits.T, h)
                else:
                    to_weight += to_logits.T @ h
        ctx.save_for_backward(to_hidden, to_weight, to_bias)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return *(None if gradient is None else gradient * slope for gradient in ctx.saved_tensors), None


def exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
