"""Attention over packed sequences: rotary positions, then softmax and both products in one step of the graph.

On a CPU texts of a sentence or a page are too short for a kernel that never holds the scores: at 50 to 130 tokens the
plain products, a sequence at a time where it lies, take two thirds of the time of torch's own attention (RoPE and
backward included). From LONGEST tokens on the scores no longer stay in the cache, and torch's is used, a group of equal
lengths at a time; it is also the slow twin. Shape suffixes: T tokens of a batch, H heads, D numbers of a head.

Prompts with answers (Batch.answers) are two products, the prompt's rows with the prompt's keys and the answers' rows
with all keys, of which only the answers' own square has anything to hide. Their slow twin is a dense mask.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch.nn import functional as F

from tlm.batches import Batch
from tlm.precision import products

LONGEST = 256  # tokens of a sequence; at 512 torch's own is faster by a tenth, or slower by a third where D is 32


def attend(qkv: torch.Tensor, batch: Batch, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[T, 3, H, D] -> [T, H * D]: each token attends to its own sequence, to all of it unless the batch has answers or
    is causal. cos, sin: [T, 1, D / 2]."""
    if flash_takes(qkv) and batch.answers is None and not batch.causal:
        return flash(*Rotate.apply(qkv, cos, sin), batch).flatten(1)
    if qkv.device.type == "cpu" and batch.longest <= LONGEST:
        lengths = [length for count, length in batch.groups for _ in range(count)]
        return Attend.apply(*Rotate.apply(qkv, cos, sin), lengths, batch.answers, batch.causal)
    return attend_by_torch(qkv, batch, cos, sin)


def attend_by_torch(qkv: torch.Tensor, batch: Batch, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The same by torch's own attention, once for each group of sequences of one length."""
    mixed, masks = [], dense_masks(batch, qkv.device)
    with products("fp32"):  # bf16 makes small products slower
        for *group, mask in zip(*map(batch.split, Rotate.apply(qkv, cos, sin)), masks, strict=True):
            query, key, value = (x.transpose(1, 2) for x in group)  # each [sequences, H, length, D]
            out = F.scaled_dot_product_attention(query, key, value, mask)
            mixed.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
    return torch.cat(mixed)


def dense_masks(batch: Batch, device: torch.device) -> Iterator[torch.Tensor | None]:
    """Of each group, which keys (last) each token may see: bool[sequences, 1, length, length]; None where all."""
    answers = iter(batch.answers or ())
    for count, length in batch.groups:
        of_group = [next(answers, ()) for _ in range(count)]
        if not batch.causal and not any(of_group):
            yield None
            continue
        mask = torch.ones(count, 1, length, length, dtype=torch.bool, device=device)
        for seen, own in zip(mask[:, 0], of_group, strict=True):
            prompt = length - sum(own)
            seen[:prompt, prompt:] = False
            seen[prompt:, prompt:] = ~hidden(own).to(device)
            if batch.causal:
                seen[:prompt, :prompt].tril_()
        yield mask


@lru_cache(maxsize=512)
def hidden(answers: tuple[int, ...]) -> torch.Tensor:
    """What answers that stand side by side must not see of each other and of what comes later: bool[tokens, tokens]."""
    return ~torch.block_diag(*(torch.ones(n, n, dtype=torch.bool).tril_() for n in answers)).bool()


def flash_takes(qkv: torch.Tensor) -> bool:
    """Whether flash attention's kernel is for such numbers: on a GPU, of 16 bits, with a head_dim it was built for."""
    return qkv.is_cuda and qkv.dtype in (torch.bfloat16, torch.float16) and qkv.shape[-1] % 8 == 0


def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: Batch) -> torch.Tensor:
    """All sequences, each to itself, in one call (Dao 2023, arXiv 2307.08691): [T, H, D]."""
    from torch.nn.attention.varlen import varlen_attn

    borders, longest = batch.borders, batch.longest
    return varlen_attn(query, key, value.contiguous(), borders, borders, longest, longest)


class Attend(torch.autograd.Function):
    """Of queries, keys and values, each [T, H, D]. `lengths` are those of the sequences in packed order; `answers` and
    `causal` as in Batch. The attention weights are kept for the backward."""

    @staticmethod
    def forward(ctx, query, key, value, lengths, answers, causal):
        mixed, weights = torch.empty_like(query), []
        ctx.pieces = lengths, answers, causal
        with products("fp32"):  # bf16 makes small products slower
            for q, out, k, v, own, _ in pieces(*ctx.pieces, (query, mixed), (key, value)):
                scores = product(q, k.mT, q.new_empty(len(q), q.shape[1], k.shape[1]), q.shape[-1] ** -0.5)
                if own:
                    scores[:, :, k.shape[1] - q.shape[1] :].masked_fill_(hidden(own), -torch.inf)
                weights.append(torch.softmax(scores, -1))
                product(weights[-1], v, out)
        ctx.save_for_backward(query, key, value, *weights)
        return mixed.flatten(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        query, key, value, *weights = ctx.saved_tensors
        to_query, to_key, to_value = (torch.empty_like(query) for _ in range(3))
        by_row, by_key = (query, slope.reshape(query.shape), to_query), (key, value, to_key, to_value)
        with products("fp32"):  # bf16 makes small products slower
            for w, piece in zip(weights, pieces(*ctx.pieces, by_row, by_key), strict=True):
                q, out, to_q, k, v, to_k, to_v, _, more = piece
                product(w.mT, out, to_v, add=more)
                to_weights = product(out, v.mT, torch.empty_like(w))
                to_scores = torch._softmax_backward_data(to_weights, w, -1, w.dtype)
                product(to_scores, k, to_q, q.shape[-1] ** -0.5)
                product(to_scores.mT, q, to_k, q.shape[-1] ** -0.5, add=more)
        return to_query, to_key, to_value, None, None, None


def pieces(
    lengths: list[int],
    answers: Sequence[tuple[int, ...]] | None,
    causal: bool,
    by_row: Sequence[torch.Tensor],
    by_key: Sequence[torch.Tensor],
):
    """The products that attention is made of: views [H, rows, D] of each of `by_row`, [H, keys, D] of each of `by_key`;
    the lengths of the answers that the last keys are, or (); and whether the keys have been in a piece before."""
    sequences = by_sequence(lengths, *by_row, *by_key)
    if answers is None and not causal:
        for sequence in sequences:
            yield *sequence, (), False
        return
    rows = len(by_row)
    for sequence, length, own in zip(sequences, lengths, answers or [()] * len(lengths), strict=True):
        prompt = length - sum(own)
        if own:
            yield *(x[:, prompt:] for x in sequence[:rows]), *sequence[rows:], own, False
        if prompt:
            yield *(x[:, :prompt] for x in sequence), (prompt,) if causal else (), bool(own)


def by_sequence(lengths: list[int], *flat: torch.Tensor):
    """Views [H, length, D] of each [T, H, D], a tuple of them a sequence."""
    return zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in flat), strict=True)


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, scale: float = 1.0, add: bool = False) -> torch.Tensor:
    """scale * a @ b, written to where `out` lies, or added to it, whatever its strides."""
    return torch.baddbmm(out, a, b, beta=int(add), alpha=scale, out=out)


class Rotate(torch.autograd.Function):
    """Queries, keys and values out of qkv [T, 3, H, D], each [T, H, D], RoPE (Su et al. 2021) on the first two.

    The gradient of a rotation is the rotation by the opposite angle, so nothing but angles is saved, and the three
    gradients are written straight into the one of qkv.
    """

    @staticmethod
    def forward(ctx, qkv, cos, sin):
        ctx.save_for_backward(cos, sin)
        query, key, value = qkv.unbind(1)
        return rotated(query, cos, sin), rotated(key, cos, sin), value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, query, key, value):
        cos, sin = ctx.saved_tensors
        gradient = query.new_empty(len(query), 3, *query.shape[1:])
        rotated(query, cos, -sin, out=gradient[:, 0])
        rotated(key, cos, -sin, out=gradient[:, 1])
        gradient[:, 2] = value
        return gradient, None, None


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Each pair (x[i], x[i + D / 2]) of [T, H, D], turned by its angle."""
    out = torch.empty_like(x) if out is None else out
    (left, right), (out_left, out_right) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(left, cos, out=out_left).addcmul_(right, sin, value=-1)
    torch.mul(right, cos, out=out_right).addcmul_(left, sin)
    return out


def angles(positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """cos and sin, each [T, 1, head_dim / 2], of position x frequency, in float32 as transformers does."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angle = (positions[:, None].float() * (1.0 / theta**exponents))[:, None, :]
    return angle.cos().to(dtype), angle.sin().to(dtype)
