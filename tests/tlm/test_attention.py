"""The CPU's attention against torch's own, and against the formula a sequence at a time in float64."""

import numpy as np
import pytest
import torch

from tlm.attention import LONGEST, angles, attend, attend_by_torch
from tlm.batches import pack

ANSWERED = [((), (3,)), ((1,), (2, 3)), ((4,), ()), ((9,), (1, 1, 2)), ((1, 5), (17,))]


def inputs(lengths, heads=3, head_dim=8, dtype=torch.float32, answers=None, attention="prefix"):
    batch = pack([np.zeros(length, np.int64) for length in lengths], answers=answers).under(attention)
    generator = torch.Generator().manual_seed(sum(lengths))
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, generator=generator, dtype=dtype).requires_grad_()
    return qkv, batch, *angles(batch.positions, head_dim, 10_000.0, dtype)


def with_gradient(function, qkv, *rest):
    out = function(qkv, *rest)
    slope = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out.detach(), torch.autograd.grad(out, qkv, slope)[0]


@pytest.mark.parametrize("lengths", [[1], [5, 1, 5, 9], [40] * 7, list(range(1, 30))])
@pytest.mark.parametrize("head_dim", [2, 32])
def test_both_ways_agree_in_value_and_gradient(lengths, head_dim):
    work = inputs(lengths, head_dim=head_dim)
    for ours, theirs in zip(with_gradient(attend, *work), with_gradient(attend_by_torch, *work), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


def test_the_formula():
    """Softmax of scaled products of rotated queries and keys, where a pair of numbers is turned as a complex number."""
    qkv, batch, _, _ = work = inputs([3, 7, 2], dtype=torch.float64)
    half = qkv.shape[-1] // 2
    turn = torch.polar(
        torch.ones(()).double(), batch.positions[:, None] / 10_000.0 ** (torch.arange(half).double() / half)
    )
    query, key = (torch.complex(x[..., :half], x[..., half:]) * turn[:, None] for x in qkv.detach().unbind(1)[:2])
    expected, begin = [], 0
    for count, length in batch.groups:
        for _ in range(count):
            q, k, v = (x[begin : begin + length] for x in (query, key, qkv.detach()[:, 2]))
            scores = torch.einsum("ihd,jhd->hij", q, k.conj()).real / qkv.shape[-1] ** 0.5
            expected.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1))
            begin += length
    torch.testing.assert_close(attend(*work).detach(), torch.cat(expected), atol=1e-6, rtol=1e-6)  # angles are float32


def test_finite_differences():
    qkv, *rest = inputs([2, 4], heads=1, head_dim=4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: attend(x, *rest), [qkv])


@pytest.mark.parametrize("attention", ["prefix", "causal"])
@pytest.mark.parametrize("answers", [*ANSWERED, None])
def test_a_prompt_with_answers_agrees_with_the_dense_mask(answers, attention):
    work = inputs([9, 20], answers=answers, attention=attention)
    for ours, theirs in zip(with_gradient(attend, *work), with_gradient(attend_by_torch, *work), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("attention", ["prefix", "causal"])
def test_what_sees_what(attention):
    """By changing one value at a time: a token sees another if what attention gives for it changes."""
    length, answers = 9, (2, 3)
    qkv, *rest = inputs([length], answers=[answers], attention=attention)
    before = attend(qkv, *rest).detach()
    for key in range(length):
        changed = qkv.detach().clone()
        changed[key, 2] += 1
        seen = (attend(changed, *rest) != before).any(1).tolist()
        for row in range(length):
            prompt, same = row < 4 and key < 4, (row < 6) == (key < 6)
            if prompt:
                expected = attention == "prefix" or key <= row
            else:
                expected = row >= 4 and (key < 4 or (same and key <= row))
            assert seen[row] == expected, (row, key)


def test_answers_in_finite_differences():
    for attention in ("prefix", "causal"):
        shape = {"heads": 1, "head_dim": 4, "dtype": torch.float64, "answers": [(2,), (), (1, 2)]}
        qkv, *rest = inputs([4, 3, 5], attention=attention, **shape)
        assert torch.autograd.gradcheck(lambda x, rest=rest: attend(x, *rest), [qkv])


def test_one_long_sequence_is_enough_for_torchs_own():
    for longest, name in ((LONGEST, "AttendBackward"), (LONGEST + 1, "CatBackward0")):
        assert attend(*inputs([4, longest])).grad_fn.name() == name


def test_gradients_reach_a_view_that_is_not_contiguous():
    qkv, *rest = inputs([6, 3])
    wide = torch.cat([qkv.detach(), qkv.detach()], dim=-1).requires_grad_()
    attend(wide[..., ::2], *rest).sum().backward()
    narrow = wide.detach()[..., ::2].contiguous().requires_grad_()
    attend(narrow, *rest).sum().backward()
    torch.testing.assert_close(wide.grad[..., ::2], narrow.grad)
