"""The product of two quantised matrices on a GPU. Twin: `product` in tlm/lowbit/linear.py, but for the order of sums.

One kernel for all three products of a Linear and for every kind of scale, as each operand lies with the sum along its
rows and brings the scales of its blocks. Tensor cores add up 8-bit products in fewer than 24 bits (on sm_90 about 14),
so that every 128 along the sum what they hold is added to a float32 sum in registers (DeepSeek-V3, arXiv 2412.19437,
3.3.2). Legend: [M, L] x [P, L] -> [M, P].
"""

import torch
import triton
import triton.language as tl

from tlm.lowbit.kernels.quantise import steps
from tlm.lowbit.quantise import Quantised

PROMOTE = 128  # numbers along the sum between promotions; the columns of a block


def product(a: Quantised, b: Quantised, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[M, L], [P, L], both with L contiguous -> [M, P]."""
    (M, L), P = a.values.shape, b.values.shape[0]
    out = torch.empty(M, P, dtype=dtype, device=a.values.device)
    blocks = a.block[1] is not None or b.block[1] is not None
    tile_m, tile_p = tile(M, P, two_scales=blocks and a.block[0] == b.block[0] == 1)
    grid = (triton.cdiv(M, tile_m) * triton.cdiv(P, tile_p),)
    scaled_matmul[grid](
        a.values, b.values, out, a.scales, b.scales, M, P, L, a.values.stride(0), b.values.stride(0), out.stride(0),
        *steps(a.scales, a.block), *steps(b.scales, b.block), a.block[0] or 1, b.block[0] or 1,
        blocks, L % PROMOTE == 0, tile_m, tile_p, PROMOTE,
        num_warps=8 if blocks else 4, num_stages=3,
    )  # fmt: skip
    return out


def tile(M: int, P: int, two_scales: bool) -> tuple[int, int]:
    """Rows and columns of the output that a program makes: less, where large tiles would leave processors idle, or a
    scale a row and a column at each step would not fit the registers (on sm_100 368 bytes a thread were spilled)."""
    if triton.cdiv(M, 128) * triton.cdiv(P, 128) < 128:
        return 64, 64
    return 128, 64 if two_scales else 128


@triton.jit
def scaled_matmul(
    a, b, out, a_scales, b_scales, M, P, L, a_step, b_step, out_step,
    a_scale_step_m, a_scale_step_l, b_scale_step_p, b_scale_step_l, A_ROWS: tl.constexpr, B_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr, EVEN: tl.constexpr, TILE_M: tl.constexpr, TILE_P: tl.constexpr, TILE_L: tl.constexpr,
):  # fmt: skip
    """BLOCKS: scales change along the sum. EVEN: L is a multiple of TILE_L."""
    # Programs that run side by side take 8 rows of tiles, so that what they read of both operands stays in the cache.
    place, tiles_m, tiles_p = tl.program_id(0), tl.cdiv(M, TILE_M), tl.cdiv(P, TILE_P)
    band = place // (8 * tiles_p)
    height = tl.minimum(tiles_m - 8 * band, 8)
    m = (8 * band + place % (8 * tiles_p) % height) * TILE_M + tl.arange(0, TILE_M)
    p = place % (8 * tiles_p) // height * TILE_P + tl.arange(0, TILE_P)
    along = tl.arange(0, TILE_L)
    in_m, in_p = m < M, p < P

    # Rows beyond the last are those from the first on, which takes no mask; their products are not written.
    a_at = a + (m % M).to(tl.int64)[:, None] * a_step + along[None, :]
    b_at = b + (p % P).to(tl.int64)[None, :] * b_step + along[:, None]
    a_scale_at = a_scales + (m // A_ROWS) * a_scale_step_m
    b_scale_at = b_scales + (p // B_ROWS) * b_scale_step_p
    total = tl.zeros((TILE_M, TILE_P), tl.float32)
    for start in range(0, L, TILE_L):
        if EVEN:
            left, right = tl.load(a_at), tl.load(b_at)
        else:
            in_l = along < L - start
            left = tl.load(a_at, mask=in_l[None, :], other=0.0)
            right = tl.load(b_at, mask=in_l[:, None], other=0.0)
        if BLOCKS:  # one after the other: their product may be infinite where the result is not
            part = tl.dot(left, right)
            part *= tl.load(a_scale_at, mask=in_m, other=0.0)[:, None]
            part *= tl.load(b_scale_at, mask=in_p, other=0.0)[None, :]
            a_scale_at += a_scale_step_l
            b_scale_at += b_scale_step_l
            total += part
        else:
            total = tl.dot(left, right, total, max_num_imprecise_acc=TILE_L)
        a_at += TILE_L
        b_at += TILE_L
    if not BLOCKS:
        total *= tl.load(a_scale_at, mask=in_m, other=0.0)[:, None]
        total *= tl.load(b_scale_at, mask=in_p, other=0.0)[None, :]
    at = out + m.to(tl.int64)[:, None] * out_step + p[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=in_m[:, None] & in_p[None, :])
