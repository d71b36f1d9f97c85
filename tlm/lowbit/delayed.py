"""Delayed scaling (Micikevicius et al. 2022, arXiv 2209.05433, and Transformer Engine's recipe): a tensor's scale comes
of the largest magnitudes of earlier steps, so that on a GPU it need not be read twice.

Scales are fixed while a step lasts, whatever its micro-batches, and the history is that of all processes. Before it
holds anything, and in evaluation, scales come from the numbers at hand.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from tlm.lowbit.quantise import Cast, Quantised
from tlm.lowbit.recipes import Recipe

STEPS = 16  # of the history
OPERANDS = ("inputs", "weight", "gradient")


@dataclass
class Largest:
    """Largest magnitudes of a Linear's operands: in each of the last STEPS steps, the latest last, and in this one."""

    history: torch.Tensor = field(default_factory=lambda: torch.zeros(len(OPERANDS), STEPS, device="cpu"))
    seen: torch.Tensor = field(default_factory=lambda: torch.zeros(len(OPERANDS), device="cpu"))

    def bound(self, recipe: Recipe) -> Recipe:
        """`recipe` with scales by the history, which notes what it casts."""
        casts = {name: Delayed(getattr(recipe, name), self, place) for place, name in enumerate(OPERANDS)}
        return replace(recipe, **casts)


@dataclass(frozen=True)
class Delayed:
    """A cast with one scale for all, by the history. What the largest of earlier steps does not cover is cut off."""

    cast: Cast
    largest: Largest
    place: int

    def __call__(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> Quantised:
        now, before = x.abs().max(), self.largest.history[self.place].max()
        if now.isfinite():  # a broken step leaves no trace in later ones
            self.largest.seen[self.place] = torch.maximum(self.largest.seen[self.place], now)
        return self.cast(x, noise, largest=before if before > 0 and now.isfinite() else now)


def linears(model: nn.Module) -> list:
    return [module for module in model.modules() if isinstance(getattr(module, "largest", None), Largest)]


def end_step(model: nn.Module, over_processes: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """What this step has seen becomes the latest of the history: `over_processes`, the largest on any of them."""
    if not (found := linears(model)):
        return
    seen = over_processes(torch.stack([module.largest.seen for module in found]))
    for module, largest in zip(found, seen, strict=True):
        module.largest = Largest(torch.cat([module.largest.history[:, 1:], largest[:, None]], 1))


def state(model: nn.Module) -> torch.Tensor | None:
    """For a checkpoint: [matrices, operands, STEPS]."""
    found = linears(model)
    return torch.stack([module.largest.history for module in found]) if found else None


def load(model: nn.Module, history: torch.Tensor | None) -> None:
    for module, largest in zip(linears(model), [] if history is None else history, strict=True):
        module.largest = Largest(largest.clone())
