"""The loss made in blocks against the one from all logits."""

import pytest
import torch

from tlm import cross_entropy
from tlm.cross_entropy import cross_entropy_sum, linear_cross_entropy_sum


def inputs(rows, dtype=torch.float32, hidden=6, vocabulary=11):
    generator = torch.Generator().manual_seed(rows)
    shapes = (rows, hidden), (vocabulary, hidden), (vocabulary,)
    tensors = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    return *tensors, torch.randint(vocabulary, (rows,), generator=generator)


def by_logits(hidden, weight, bias, targets):
    return cross_entropy_sum(hidden @ weight.T + bias, targets)


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 10])
def test_loss_and_gradients_of_any_number_of_blocks(rows, monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK_ELEMENTS", 3 * 11)  # three rows
    work = inputs(rows)
    ours, theirs = linear_cross_entropy_sum(*work), by_logits(*work)
    torch.testing.assert_close(ours, theirs)
    pairs = (torch.autograd.grad(0.5 * loss, work[:3]) for loss in (ours, theirs))
    for mine, other in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, other)


def test_finite_differences(monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK_ELEMENTS", 2 * 11)
    *tensors, targets = inputs(5, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: linear_cross_entropy_sum(*x, targets), tensors)


def test_autocast_rounds_the_products_alone():
    work = inputs(4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy_sum(*work)
    assert loss.dtype == torch.float32
    assert 0 < abs(loss.item() / by_logits(*work).item() - 1) < 0.02
    for gradient, of in zip(torch.autograd.grad(loss, work[:3]), work, strict=False):
        assert gradient.dtype == of.dtype


def test_large_logits_do_not_overflow():
    hidden, weight, bias, targets = inputs(3)
    loss = linear_cross_entropy_sum(1e4 * hidden, weight, bias, targets)
    assert loss.isfinite()
    torch.testing.assert_close(loss, by_logits(1e4 * hidden, weight, bias, targets))
