"""AdamW with moments of 8 bits, 2.03 bytes a parameter (Dettmers et al. 2022, arXiv 2110.02861), in one pass.

Levels, blocks and order of work are those of bitsandbytes' AdamW8bit, whose CPU version takes ten passes in torch. One
thing is not: a second moment above zero gets at least the least level above zero. A second moment of zero beside a
first that is not makes a step of m / eps where the next gradient is zero, such as that of a rare word beside a frequent
one in its block: runs diverged. (bitsandbytes' CPU version rounds most of these up as well, by its approximations.) The
kernel is adamw8bit.cpp; `step_by_torch` is its slow twin and gives the same bits.
"""

import functools
import math
from dataclasses import dataclass

import torch

from tlm.lowbit.cpu.build import kernels

BLOCK = 256
SMALLEST = 4096  # numbers; parameters below keep 32 bits, as in bitsandbytes: biases and norms weigh nothing
DECADES = 7


@dataclass(frozen=True)
class Levels:
    """float32 tables. `least`: [8], from where on a number belongs to a decade (the last is the level 1);
    `slope`, `start`, `first`, `last`: a number's place among all levels, counted from zero up; `values`: the levels
    from zero up, made of `value_slope` and `value_start` as the kernel makes them."""

    least: torch.Tensor
    slope: torch.Tensor
    start: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    value_slope: torch.Tensor
    value_start: torch.Tensor
    values: torch.Tensor

    @property
    def table(self) -> torch.Tensor:
        return torch.cat(
            [self.least, self.slope, self.start, self.first, self.last, self.value_slope, self.value_start]
        )

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """int64, of numbers in [0, 1]: which level, from zero up."""
        above = torch.bucketize(x, self.least, right=True)
        decade = (above - 1).clamp(min=0)
        at = x * self.slope[decade] + self.start[decade]
        at = torch.minimum(at, self.last[decade]).maximum(self.first[decade])
        return torch.where(above == 0, 0, at.nan_to_num(nan=1.0).long())


@functools.cache
def levels(signed: bool) -> Levels:
    """Decade d, below 10^(d - 6), holds 2^d levels with a sign and twice as many without: the middles of as many equal
    parts of its upper nine tenths. Zero is a level, and 1."""
    base = 0 if signed else 1  # the exponent of the first decade's size
    exponents = [d + base for d in range(DECADES)]
    tops = [10.0 ** (d - DECADES + 1) for d in range(DECADES)]
    # The n-th level, n = 2^e m with the mantissa m in [1, 2): top (0.1 + 0.9 (m - 1 + 2^-e / 2)).
    value_slope = torch.tensor([0.9 * top for top in tops] + [0.0])
    value_start = torch.tensor(
        [top * (0.1 - 0.9 + 0.45 / 2**e) for top, e in zip(tops, exponents, strict=True)] + [1.0]
    )
    numbers = torch.arange(2**base, 2 ** (DECADES + base) + 1)
    mantissa, exponent = torch.frexp(numbers.float())
    decade = exponent.long() - 1 - base
    values = torch.cat([torch.zeros(1), value_slope[decade] * (2 * mantissa) + value_start[decade]])
    offset = 2**base - 1  # of numbers beside places in `values`: without a sign zero is the number 1
    firsts = [2**e for e in exponents] + [2 ** (DECADES + base)]
    least = torch.tensor([(values[n - offset - 1].item() + values[n - offset].item()) / 2 for n in firsts])
    slope = torch.tensor([2**e / 0.9 / top for top, e in zip(tops, exponents, strict=True)] + [0.0])
    start = torch.tensor([2**e * (1 - 0.1 / 0.9) for e in exponents] + [float(firsts[-1])])
    last = torch.tensor([2 * n - 0.5 for n in firsts[:-1]] + [float(firsts[-1])])
    return Levels(least, slope, start, torch.tensor(firsts).float(), last, value_slope, value_start, values)


def quantised(x: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [n] -> uint8 [n], float32 [blocks]: byte 127 is zero with a sign, 0 without (of zero alone)."""
    blocks = torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    shares = blocks * (1.0 / scales.clamp(min=1e-38))[:, None]
    number = levels(signed).nearest(shares.abs())
    if signed:
        codes = torch.where(shares.signbit(), 127 - number.clamp(max=127), 127 + number)
    else:
        codes = number.maximum(torch.where(blocks > 0, 2, 1)) - 1
    return codes.to(torch.uint8).flatten()[: len(x)], scales


def dequantised(codes: torch.Tensor, scales: torch.Tensor, signed: bool) -> torch.Tensor:
    """float32 [n]."""
    place = codes.long()
    values = levels(signed).values.to(codes.device)
    shares = values[(place - 127).abs()] * torch.where(place < 127, -1.0, 1.0) if signed else values[place]
    return shares * scales.repeat_interleave(BLOCK)[: len(codes)]


@dataclass(frozen=True)
class Rates:
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    step: int  # from 1

    @property
    def numbers(self) -> torch.Tensor:
        """float32, as the kernel and the twin read them: both moments' shares of the old and the new, what is kept of a
        weight, the rate with the first moment's bias in it, one over the root of the second's, eps."""
        (beta1, beta2), lr = self.betas, self.lr
        rate, root = lr / (1 - beta1**self.step), 1 / math.sqrt(1 - beta2**self.step)
        return torch.tensor([beta1, 1 - beta1, beta2, 1 - beta2, 1 - lr * self.weight_decay, rate, root, self.eps])


def new_state(p: torch.Tensor) -> dict[str, torch.Tensor]:
    """Moments of zero."""
    scales = [torch.zeros(-(-p.numel() // BLOCK), device=p.device) for _ in range(2)]
    codes = [torch.full(p.shape, zero, dtype=torch.uint8, device=p.device) for zero in (127, 0)]
    return dict(exp_avg=codes[0], exp_avg_scales=scales[0], exp_avg_sq=codes[1], exp_avg_sq_scales=scales[1])


def step(p: torch.Tensor, grad: torch.Tensor, state: dict[str, torch.Tensor], rates: Rates) -> None:
    """One step of p, float32 of any shape, and of its state, in place; by the kernel where there is one."""
    flat = p if p.is_contiguous() else p.contiguous()
    library = kernels() if p.device.type == "cpu" else None
    (step_by_torch if library is None else step_by_kernel)(flat, grad.contiguous(), state, rates)
    if flat is not p:
        p.copy_(flat)


def step_by_kernel(
    p: torch.Tensor, grad: torch.Tensor, state: dict[str, torch.Tensor], rates: Rates, instructions: str | None = None
) -> None:
    numbers, tables = rates.numbers, both_tables()
    held = [state[name] for name in ("exp_avg", "exp_avg_sq", "exp_avg_scales", "exp_avg_sq_scales")]
    kernels(instructions).tlm_adamw8bit(
        *(t.data_ptr() for t in (p, grad, *held)), p.numel(), numbers.data_ptr(), tables.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip


@functools.cache
def both_tables() -> torch.Tensor:
    return torch.cat([levels(True).table, levels(False).table])


def step_by_torch(p: torch.Tensor, grad: torch.Tensor, state: dict[str, torch.Tensor], rates: Rates) -> None:
    """The slow twin. Products and sums are apart, where torch's own `add(alpha=)` would round once."""
    beta1, rest1, beta2, rest2, keep, rate, root, eps = rates.numbers.to(p.device)
    weights, g = p.view(-1), grad.view(-1)
    m = dequantised(state["exp_avg"].view(-1), state["exp_avg_scales"], True) * beta1 + g * rest1
    v = dequantised(state["exp_avg_sq"].view(-1), state["exp_avg_sq_scales"], False) * beta2 + g * g * rest2
    roots = v.double().sqrt().float()  # in float32 torch may take MKL's root, which is not the nearest number
    weights.copy_(weights * keep - m / (roots * root + eps) * rate)
    for name, moment, signed in (("exp_avg", m, True), ("exp_avg_sq", v, False)):
        codes, scales = quantised(moment, signed)
        state[name].view(-1).copy_(codes)
        state[f"{name}_scales"].copy_(scales)
