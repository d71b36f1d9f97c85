"""Quantise on a GPU: 8-bit values with their scales, and of the same numbers, read once, those of the transpose, which
the backward pass reads. Twin: `Cast` in tlm/lowbit/quantise.py, to the bit.

The numbers are a matrix ("plain"), or come of one as it is read, and are never written themselves: its rows normed
("norm"; twin F.layer_norm) or gated ("geglu"; twin F.gelu(value) * gate). Scales of the tensor or of rows need a pass
for the largest magnitudes before the cast; those of 1 x 128 and 128 x 128 blocks do not, as a block lies in one tile.
Legend: M rows, L columns, of the numbers that are quantised.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from tlm.lowbit.kernels.rounding import NATIVE, TINY, magnitude, rounded, scale_of
from tlm.lowbit.quantise import E4M3, ROW, TENSOR, Cast, Quantised

ACROSS, SQUARE = (1, 128), (128, 128)
SCALES = {TENSOR: "tensor", ROW: "row", ACROSS: "across", SQUARE: "square"}  # blocks that kernels know
TILE = {TENSOR: 64, ROW: 64, ACROSS: 128, SQUARE: 128}


@dataclass(frozen=True)
class Plain:
    x: torch.Tensor  # [M, L], any strides

    kind = "plain"

    @property
    def shape(self) -> tuple[int, int]:
        return self.x.shape[0], self.x.shape[1]

    def numbers(self) -> torch.Tensor:
        """The slow twin: what is quantised, float32 [M, L]."""
        return self.x.float()


@dataclass(frozen=True)
class Normed:
    """LayerNorm without bias, over the columns."""

    x: torch.Tensor  # [M, L]
    weight: torch.Tensor  # [L]
    eps: float
    mean: torch.Tensor  # float32 [M]
    rstd: torch.Tensor  # float32 [M]

    kind = "norm"
    shape = Plain.shape

    @staticmethod
    def of(x: torch.Tensor, weight: torch.Tensor, eps: float) -> "Normed":
        mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
        block = triton.next_power_of_2(x.shape[1])
        statistics[(x.shape[0],)](x, mean, rstd, x.shape[1], *x.stride(), eps, block, num_warps=4)
        return Normed(x, weight, eps, mean, rstd)

    def numbers(self) -> torch.Tensor:
        return F.layer_norm(self.x.float(), self.weight.shape, self.weight.float(), None, self.eps)


@dataclass(frozen=True)
class Gated:
    """gelu(value) * gate of rows [value, gate]."""

    x: torch.Tensor  # [M, 2 L]

    kind = "geglu"

    @property
    def shape(self) -> tuple[int, int]:
        return self.x.shape[0], self.x.shape[1] // 2

    def numbers(self) -> torch.Tensor:
        value, gate = self.x.float().chunk(2, -1)
        return F.gelu(value) * gate


Source = Plain | Normed | Gated


def quantise(
    source: Source, cast: Cast, turned: bool = False, odd: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[Quantised, Quantised | None]:
    """The numbers by `cast`; with `turned` their transpose by it, too. `odd`: two int64 scalars, to which the numbers
    of blocks of zeros and of blocks that are not finite are added."""
    (M, L), x = source.shape, source.x
    scale, form, tile = SCALES[cast.block], "e4m3" if cast.format is E4M3 else "e5m2", TILE[cast.block]
    values, scales = padded(M, L, x.device), empty_scales(M, L, cast.block, x.device)
    across_values, across_scales = values, scales  # of the transpose
    if turned:
        across_values, across_scales = padded(L, M, x.device), empty_scales(L, M, cast.block, x.device)
    normed = source if isinstance(source, Normed) else None
    read = (x, *((normed.weight, normed.mean, normed.rstd) if normed else (x, x, x)), M, L, *x.stride())
    tiles = (triton.cdiv(M, tile), triton.cdiv(L, tile))
    rows, columns = scales, across_scales  # largest magnitudes, where a pass must find them first
    if scale in ("tensor", "row"):
        rows, columns = torch.zeros(2, max(M, L) if scale == "row" else 1, dtype=torch.int32, device=x.device)
        find_largest[tiles](*read, rows, columns, source.kind, scale, turned, tile, num_warps=4)
    quantise_tile[tiles](
        *read, rows, columns, values, values.stride(0), scales, *steps(scales, cast.block),
        across_values, across_values.stride(0), across_scales, *steps(across_scales, cast.block),
        *(odd or (rows, rows)), source.kind, scale, form, turned, odd is not None, tile, NATIVE, num_warps=tile // 16,
    )  # fmt: skip
    done = Quantised(values.view(cast.format.dtype), scales, cast.block)
    return done, Quantised(across_values.view(cast.format.dtype), across_scales, cast.block) if turned else None


def padded(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """uint8 [rows, columns] whose rows begin at multiples of 16 bytes, as wide loads and tensor cores want them."""
    return torch.empty(rows, triton.cdiv(columns, 16) * 16, dtype=torch.uint8, device=device)[:, :columns]


def empty_scales(rows: int, columns: int, block: tuple, device: torch.device) -> torch.Tensor:
    shape = (triton.cdiv(size, part or size or 1) for size, part in zip((rows, columns), block, strict=True))
    return torch.empty(tuple(shape), dtype=torch.float32, device=device)


def steps(scales: torch.Tensor, block: tuple) -> tuple[int, int]:
    """Numbers between the scales of neighbouring blocks; 0 along a side that has one block only."""
    return tuple(step if part else 0 for step, part in zip(scales.stride(), block, strict=True))


@triton.jit
def read_tile(x, weight, mean, rstd, row, col, M, L, step_m, step_l, SOURCE: tl.constexpr):
    """float32 numbers at rows `row` and columns `col`; 0 outside."""
    inside = (row < M)[:, None] & (col < L)[None, :]
    at = x + row.to(tl.int64)[:, None] * step_m + col.to(tl.int64)[None, :] * step_l
    y = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if SOURCE == "norm":
        middle, by = tl.load(mean + row, mask=row < M, other=0.0), tl.load(rstd + row, mask=row < M, other=0.0)
        y = (y - middle[:, None]) * by[:, None] * tl.load(weight + col, mask=col < L, other=0.0).to(tl.float32)[None, :]
        y = tl.where(inside, y, 0.0)
    if SOURCE == "geglu":
        gate = tl.load(at + L * step_l, mask=inside, other=0.0).to(tl.float32)
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476)) * gate
    return y


@triton.jit
def count(scale, ours, zeros, infinite):
    """Adds to both numbers, which is seldom needed."""
    none = (scale == TINY).to(tl.int32) * 0
    tl.atomic_add(zeros + none, 1, mask=ours & (scale == TINY), sem="relaxed")
    tl.atomic_add(infinite + none, 1, mask=ours & (scale != scale), sem="relaxed")


@triton.jit
def statistics(x, mean, rstd, L, step_m, step_l, eps, BLOCK: tl.constexpr):
    """Mean and 1 / standard deviation of each row."""
    row, col = tl.program_id(0), tl.arange(0, BLOCK)
    y = tl.load(x + row.to(tl.int64) * step_m + col.to(tl.int64) * step_l, mask=col < L, other=0.0).to(tl.float32)
    middle = tl.sum(y, 0) / L
    away = tl.where(col < L, y - middle, 0.0)
    tl.store(mean + row, middle)
    tl.store(rstd + row, 1.0 / tl.sqrt(tl.sum(away * away, 0) / L + eps))


@triton.jit
def find_largest(
    x, weight, mean, rstd, M, L, step_m, step_l, rows, columns,
    SOURCE: tl.constexpr, SCALE: tl.constexpr, TURNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Largest magnitudes of the tensor, or of rows and of columns, as int32, into zeros."""
    row, col = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.program_id(1) * TILE + tl.arange(0, TILE)
    size = magnitude(read_tile(x, weight, mean, rstd, row, col, M, L, step_m, step_l, SOURCE))
    if SCALE == "tensor":
        tl.atomic_max(rows, tl.max(tl.max(size, 1), 0))
    else:
        tl.atomic_max(rows + row, tl.max(size, 1), mask=row < M)
        if TURNED:
            tl.atomic_max(columns + col, tl.max(size, 0), mask=col < L)


@triton.jit
def quantise_tile(
    x, weight, mean, rstd, M, L, step_m, step_l, rows, columns,
    values, values_step, scales, scales_step_m, scales_step_l,
    across_values, across_step, across_scales, across_step_l, across_step_m, zeros, infinite,
    SOURCE: tl.constexpr, SCALE: tl.constexpr, FORMAT: tl.constexpr, TURNED: tl.constexpr, COUNTED: tl.constexpr,
    TILE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    tile_m, tile_l = tl.program_id(0), tl.program_id(1)
    row, col = tile_m * TILE + tl.arange(0, TILE), tile_l * TILE + tl.arange(0, TILE)
    in_m, in_l = row < M, col < L
    y = read_tile(x, weight, mean, rstd, row, col, M, L, step_m, step_l, SOURCE)

    if SCALE == "tensor":
        scale = scale_of(tl.load(rows), FORMAT)
        tl.store(scales, scale)
        ours = (tile_m == 0) & (tile_l == 0)
    elif SCALE == "row":
        scale = scale_of(tl.load(rows + row, mask=in_m, other=0), FORMAT)
        if tile_l == 0:
            tl.store(scales + row * scales_step_m, scale, mask=in_m)
        ours = in_m & (tile_l == 0)
    elif SCALE == "across":
        scale = scale_of(tl.max(magnitude(y), 1), FORMAT)
        tl.store(scales + row * scales_step_m + tile_l * scales_step_l, scale, mask=in_m)
        ours = in_m
    else:
        scale = scale_of(tl.max(tl.max(magnitude(y), 1), 0), FORMAT)
        tl.store(scales + tile_m * scales_step_m + tile_l * scales_step_l, scale)
        ours = tile_m >= 0
    if COUNTED:  # a block by one program alone
        count(scale, ours, zeros, infinite)
    if SCALE == "row" or SCALE == "across":
        bits = rounded(tl.div_rn(y, tl.broadcast_to(scale[:, None], (TILE, TILE))), FORMAT, NATIVE)
    else:
        bits = rounded(tl.div_rn(y, tl.full((TILE, TILE), scale, tl.float32)), FORMAT, NATIVE)
    inside = in_m[:, None] & in_l[None, :]
    tl.store(values + row.to(tl.int64)[:, None] * values_step + col[None, :], bits, mask=inside)

    if TURNED:
        # Rounded anew, also where the scale is the same: given one rounding for both, ptxas 12.8 stored bytes of the
        # float32 quotient here (Triton 3.6, an H200, columns a multiple of 16). Hence a scale from other reads.
        if SCALE == "tensor":
            scale = scale_of(tl.load(rows + 0 * col), FORMAT)
            tl.store(across_scales + 0 * col, scale)
        elif SCALE == "row":
            scale = scale_of(tl.load(columns + col, mask=in_l, other=0), FORMAT)
            if tile_m == 0:
                tl.store(across_scales + col * across_step_l, scale, mask=in_l)
        elif SCALE == "across":
            scale = scale_of(tl.max(magnitude(y), 0), FORMAT)
            tl.store(across_scales + col * across_step_l + tile_m * across_step_m, scale, mask=in_l)
        else:
            scale = scale_of(tl.max(tl.max(magnitude(y), 0), 0), FORMAT)
            tl.store(across_scales + tile_m * across_step_m + tile_l * across_step_l, scale)
            scale = tl.full((TILE,), scale, tl.float32)
        bits = rounded(tl.div_rn(y, tl.broadcast_to(scale[None, :], (TILE, TILE))), FORMAT, NATIVE)
        at = across_values + col.to(tl.int64)[:, None] * across_step + row[None, :]
        tl.store(at, tl.trans(bits), mask=in_l[:, None] & in_m[None, :])
