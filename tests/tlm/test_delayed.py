"""Delayed scaling: scales of a history that checkpoints keep, processes share, and broken steps leave as it is."""

from collections import Counter

import pytest
import torch

from tlm.lowbit import delayed
from tlm.lowbit.linear import Linear, Products
from tlm.lowbit.recipes import RECIPES
from tlm.lowbit.sqnr import sqnr_db


def alone(seen):
    return seen


def step(layer, x, over_processes=alone):
    out = layer(x)
    out.sum().backward()
    delayed.end_step(layer, over_processes)
    return out.detach()


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return Linear(40, 48, False, "fp8-delayed")


def test_scales_are_of_the_largest_of_the_last_steps(layer):
    """By hand: inputs of largest magnitude 7, 3, 3 ...; the 7 is forgotten after the steps that the history holds."""
    x = torch.randn(32, 40).clamp(-3, 3)
    x[0, 0], x[1, 1] = 3, 7
    first = layer(x)
    assert torch.equal(first, Products.apply(x, layer.weight, RECIPES["fp8-tensorwise"], None, Counter()))
    step(layer, x)
    x[1, 1] = -3
    for age in range(delayed.STEPS + 1):
        cast = layer.largest.bound(RECIPES["fp8-delayed"]).inputs(x)
        assert cast.scales.item() == torch.tensor((7 if age < delayed.STEPS else 3) / 448).item()
        step(layer, x)
    inputs, weight, gradient = layer.largest.history
    assert inputs.tolist() == [3.0] * delayed.STEPS
    assert (weight == layer.weight.abs().max()).all()
    assert (gradient == 1).all()


def test_what_the_history_does_not_cover_is_cut_off_once(layer):
    x = torch.ones(4, 40)
    step(layer, x)
    assert (layer.largest.bound(RECIPES["fp8-delayed"]).inputs(8 * x).dequantised() == 1).all()
    step(layer, 8 * x)
    assert (layer.largest.bound(RECIPES["fp8-delayed"]).inputs(8 * x).dequantised() == 8).all()


def test_micro_batches_of_a_step_share_scales_and_computing_again_changes_nothing(layer):
    x = torch.randn(32, 40)
    step(layer, 2 * x)
    whole = layer(x)
    parts = torch.cat([layer(x[:8]), layer(x[8:])])
    assert sqnr_db(whole, parts) > 100
    assert torch.equal(layer(x), whole)


def test_evaluation_scales_by_the_numbers_at_hand_and_notes_nothing(layer):
    x = torch.randn(32, 40)
    step(layer, 100 * x)
    layer.eval()
    assert torch.equal(layer(x), Products.apply(x, layer.weight, RECIPES["fp8-tensorwise"], None, Counter()))
    assert not layer.largest.seen.any()


@pytest.mark.parametrize("what", [torch.inf, torch.nan])
def test_a_broken_step_is_loud_and_forgotten(layer, what):
    x = torch.randn(32, 40)
    step(layer, x)
    before = layer.largest.history[0].max().item()
    broken = x.clone()
    broken[3, 3] = what
    assert step(layer, broken).isnan().all()
    assert layer.largest.history[0].max().item() == before
    assert step(layer, x).isfinite().all()


def test_the_history_is_that_of_all_processes_and_goes_through_a_checkpoint(layer):
    other = torch.tensor([[5.0, 0.0, 0.25]])
    step(layer, torch.ones(4, 40), over_processes=lambda seen: torch.maximum(seen, other))
    assert layer.largest.history[:, -1].tolist() == [5.0, layer.weight.abs().max().item(), 1.0]
    again = Linear(40, 48, False, "fp8-delayed")
    delayed.load(again, delayed.state(layer))
    assert torch.equal(again.largest.history, layer.largest.history)
    assert delayed.state(torch.nn.Linear(3, 3)) is None
    assert not any("largest" in name for name in layer.state_dict())  # an exported model knows no history
