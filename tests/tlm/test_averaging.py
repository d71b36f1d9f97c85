import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tasks.errors import InputError
from tlm.averaging import Average
from tlm.config import StageConfig

STEPS = 50


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def stage(kind, share=0.2):
    return StageConfig(steps=STEPS, average=kind, average_share=share)


def train(net, *averages, first=0, last=STEPS):
    """SGD steps `first` to `last`, each on data of its own; every average is updated after each."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(first, last):
        torch.manual_seed(step)
        dtype = next(net.parameters()).dtype
        optimizer.zero_grad()
        (net(torch.randn(16, 6, dtype=dtype)) - torch.randn(16, 3, dtype=dtype)).square().mean().backward()
        optimizer.step()
        for average in averages:
            average.update(net)


class Recorder:
    """Stands where an average does and keeps the weights of every step."""

    def __init__(self):
        self.weights = []

    def update(self, net):
        self.weights.append([p.detach().clone() for p in net.parameters()])


def averaged(average, net):
    with average.swapped(net):
        return [p.detach().clone() for p in net.parameters()]


def assert_near(ours, theirs, atol=1e-7):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("share", [0.02, 0.2, 1.0])
def test_ema_is_the_weighted_mean_over_50_steps(share):
    """sum_i d^(50-i) x_i / sum_i d^(50-i), with d = 1 - 1 / (share of 50 steps)."""
    net, average, seen = network(torch.float64), Average(stage("ema", share)), Recorder()
    train(net, average, seen)
    decay = 1 - 1 / (share * STEPS)
    weights = [decay ** (STEPS - 1 - i) for i in range(STEPS)]
    steps = zip(*seen.weights, strict=True)  # of each parameter, its weights after every step
    by_hand = [sum(w * x for w, x in zip(weights, xs, strict=True)) / sum(weights) for xs in steps]
    assert_near(averaged(average, net), by_hand, atol=1e-12)


def test_ema_is_torchs_once_its_bias_is_corrected():
    """torch begins with the first weights x_1 at full weight: (theirs - d^t x_1) / (1 - d^t) is the mean without it."""
    net, average, seen = network(torch.float64), Average(stage("ema")), Recorder()
    theirs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update = theirs.update_parameters
    train(net, average, theirs, seen)
    bias = 0.9**STEPS
    corrected = [(p - bias * x) / (1 - bias) for p, x in zip(theirs.parameters(), seen.weights[0], strict=True)]
    assert_near(averaged(average, net), corrected)


@pytest.mark.parametrize(("share", "steps"), [(1.0, 50), (0.2, 10), (0.0, 1)])
def test_last_is_torchs_swa_over_the_last_steps(share, steps):
    net, average = network(), Average(stage("last", share))
    theirs = AveragedModel(net)
    theirs.update = theirs.update_parameters
    train(net, average, last=STEPS - steps)
    train(net, average, theirs, first=STEPS - steps)
    assert_near(averaged(average, net), list(theirs.parameters()))


@pytest.mark.parametrize("kind", ["none", "last"])
def test_weights_stay_as_they_are_before_anything_is_averaged(kind):
    net, average = network(), Average(stage(kind))
    train(net, average, last=STEPS - 10)
    assert all(torch.equal(a, b) for a, b in zip(averaged(average, net), net.parameters(), strict=True))
    assert list(average.state()) == ["steps"]


def test_none_never_averages():
    net, average = network(), Average(stage("none"))
    train(net, average)
    assert average.mean == {}


@pytest.mark.parametrize("kind", ["ema", "last"])
def test_training_goes_on_as_if_nothing_had_been_swapped(kind):
    plain, net, average = network(), network(), Average(stage(kind))
    train(plain)
    for step in range(STEPS):
        train(net, average, first=step, last=step + 1)
        with pytest.raises(KeyError), average.swapped(net):
            raise KeyError  # weights come back when a score fails, too
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))
    average.apply(net)
    assert not torch.equal(net[0].weight, plain[0].weight)


@pytest.mark.parametrize("kind", ["none", "ema", "last"])
@pytest.mark.parametrize("killed", [0, 17, 44])
def test_a_resumed_average_is_the_same_to_the_bit(kind, killed):
    net, average = network(), Average(stage(kind))
    train(net, average, last=killed)
    state, other = copy.deepcopy(average.state()), copy.deepcopy(net)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    train(net, average, first=killed)

    resumed = Average(stage(kind))
    resumed.load(state)
    train(other, resumed, first=killed)
    assert average.state().keys() == resumed.state().keys()
    assert all(torch.equal(value, resumed.state()[name]) for name, value in average.state().items())


def test_pieces_of_zero_3_are_refused():
    net = network()
    net[0].weight.ds_id = 1
    with pytest.raises(InputError, match=r"stage=3.*average=none"):
        Average(stage("ema")).update(net)
