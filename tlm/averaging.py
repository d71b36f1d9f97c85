"""Averages of the weights over steps, scored and handed on in place of the last weights.

ema: exponential moving average with bias correction (Polyak & Juditsky 1992; Kingma & Ba 2015, section 3). last: plain
mean over a stage's last steps (tail averaging, Jain et al. 2018; SWA, Izmailov et al. 2018). Both are one running mean,
so one copy of the weights is all that is kept, and all that a checkpoint needs.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from tasks.errors import InputError
from tlm.config import StageConfig


class Average:
    """The average of one stage: `update` after each optimizer step, `swapped` around scores, `apply` at its end.

    While nothing has been averaged (average=none, or before the last steps) the weights stay as they are.
    """

    def __init__(self, stage: StageConfig):
        span = max(1, round(stage.average_share * stage.steps))
        first = {"none": stage.steps, "ema": 0, "last": max(0, stage.steps - span)}
        self.unused = first[stage.average]  # steps before the average begins
        self.decay = 1 - 1 / span if stage.average == "ema" else 1.0
        self.steps = 0
        self.mean: dict[str, torch.Tensor] = {}

    def update(self, model: nn.Module) -> None:
        """Take in the weights as they are after one more step. Raises InputError where ZeRO 3 holds them in pieces."""
        self.steps += 1
        if self.steps <= self.unused:
            return
        weights = parameters(model)
        self.mean = {name: self.mean[name].to(p.device) if self.mean else p.clone() for name, p in weights.items()}
        share = newest_share(self.steps - self.unused, self.decay)
        torch._foreach_lerp_(list(self.mean.values()), list(weights.values()), share)

    def apply(self, model: nn.Module) -> None:
        """Overwrite the model's weights by the average, in place: DeepSpeed's flat buffers hold the same memory."""
        copy(self.mean, model)

    @contextlib.contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """The model holds the average inside, and its own weights, to the bit, after."""
        own = {name: p.clone() for name, p in parameters(model).items()} if self.mean else {}
        self.apply(model)
        try:
            yield
        finally:
            copy(own, model)

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint needs, not copied: the number of steps and the mean by the parameters' names."""
        return {"steps": torch.tensor(self.steps), **self.mean}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        self.steps = int(state["steps"])
        self.mean = {name: mean.clone() for name, mean in state.items() if name != "steps"}


def newest_share(count: int, decay: float) -> float:
    """Share of the newest of `count` terms in a mean where each weighs `decay` times the one after it.

    mean_t = mean_(t-1) + share * (x_t - mean_(t-1)) is then sum_i decay^(t-i) x_i / sum_i decay^(t-i): the plain mean
    where decay is 1.
    """
    return 1 / count if decay == 1 else (1 - decay) / (1 - decay**count)


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's parameters by name, but for frozen ones, without their history; they share its memory."""
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise InputError("deepspeed.zero_optimization.stage=3: cuts up what average would keep; set average=none")
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def copy(weights: dict[str, torch.Tensor], model: nn.Module) -> None:
    own = parameters(model) if weights else {}
    for name, weight in weights.items():
        own[name].copy_(weight)
