"""Matrices in 8 bits and fewer: values and the scales that belong to their blocks, exactly as a kernel must give them.

A block's scale is the largest magnitude in it ("current scaling") divided by the format's largest number, in float32;
values are x / scale, cut to the format's range and rounded to nearest, ties to even. Policy for odd inputs: a block of
zeros has the least scale, TINY, and gives zeros; one that holds an infinity or NaN has the scale NaN and comes out as
NaN altogether, so that a broken step is as loud as in fp32, and `spike=` sees it.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

TINY = 2.0**-126  # least scale: the least normal float32, since denormals are flushed in training

# Rows x columns of the blocks that share a scale; None: all of them. Columns run along the sum of the product.
Block = tuple[int | None, int | None]
TENSOR: Block = (None, None)
ROW: Block = (1, None)


@dataclass(frozen=True)
class Format:
    dtype: torch.dtype
    largest: float


E4M3 = Format(torch.float8_e4m3fn, 448.0)
E5M2 = Format(torch.float8_e5m2, 57344.0)
INT8 = Format(torch.int8, 127.0)


@dataclass(frozen=True)
class Quantised:
    """values: [M, L] in 8 bits; scales: float32 [M / rows, L / columns], rounded up, of blocks rows x columns."""

    values: torch.Tensor
    scales: torch.Tensor
    block: Block

    def dequantised(self) -> torch.Tensor:
        """float32 [M, L]."""
        blocks = to_blocks(self.values.float(), self.block) * self.scales[:, None, :, None]
        return from_blocks(blocks, self.values.shape)


def to_blocks(x: torch.Tensor, block: Block) -> torch.Tensor:
    """[M, L] -> [M / rows, rows, L / columns, columns]; what is cut short at an edge is filled up with zeros."""
    rows, columns = (size or full for size, full in zip(block, x.shape, strict=True))
    x = F.pad(x, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
    return x.view(x.shape[0] // rows, rows, x.shape[1] // columns, columns)


def from_blocks(blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return blocks.flatten(2).flatten(0, 1)[: shape[0], : shape[1]]


@dataclass(frozen=True)
class Cast:
    """float32 [M, L] -> Quantised. `power_of_two`: the scale is rounded up to one, so that nothing is cut off, and
    fits E8M0 (Mishra et al. 2025, arXiv 2506.08027)."""

    format: Format
    block: Block
    power_of_two: bool = False

    def __call__(
        self, x: torch.Tensor, noise: torch.Tensor | None = None, largest: torch.Tensor | None = None
    ) -> Quantised:
        """`noise`: uniform in [0, 1), for each number; then an integer format rounds up with the chance that leaves
        the mean as it is (stochastic rounding). `largest`: in place of the largest magnitude in each block."""
        blocks, most = to_blocks(x.contiguous(), self.block), self.format.largest
        scales = usable((blocks.abs().amax((1, 3)) if largest is None else largest.expand(1, 1)) / most)
        if self.power_of_two:
            scales = next_power_of_two(scales)
        values = from_blocks(blocks / scales[:, None, :, None], x.shape).clamp(-most, most).nan_to_num(nan=0.0)
        if self.format.dtype == torch.int8:
            values = values.round() if noise is None else values.floor() + (noise < values - values.floor())
        return Quantised(values.to(self.format.dtype), scales, self.block)


def usable(scales: torch.Tensor) -> torch.Tensor:
    """At least TINY; NaN where it is no number or infinite."""
    return torch.where(scales.isfinite(), scales.clamp(min=TINY), torch.nan)


def next_power_of_two(scales: torch.Tensor) -> torch.Tensor:
    """Of positive float32, the least that is no less: a mantissa that is not zero carries into the exponent."""
    powers = (scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000
    return torch.where(scales.isnan(), scales, powers.view(torch.float32))


def ternary(w: torch.Tensor) -> Quantised:
    """-1, 0 or 1 times the mean magnitude (BitNet b1.58, Ma et al. 2024, arXiv 2402.17764)."""
    scale = usable(w.abs().mean()[None, None])
    values = (w / scale).round().clamp(-1, 1).nan_to_num(nan=0.0)
    return Quantised(values.to(torch.int8), scale, TENSOR)


def binary(w: torch.Tensor) -> Quantised:
    """-1 or 1 (above the mean weight), times the mean magnitude (BitNet, Wang et al. 2023, arXiv 2310.11453)."""
    scale = usable(w.abs().mean()[None, None])
    return Quantised(torch.where(w > w.mean(), 1, -1).to(torch.int8), scale, TENSOR)
