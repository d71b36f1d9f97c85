"""Device functions: scales, and numbers rounded to 8 bits, as bits. Twin: `Cast` in tlm/lowbit/quantise.py, to the bit.

On a GPU the hardware's own conversion rounds (cvt.rn.satfinite). Triton's interpreter rounds wrongly where a mantissa
carries into the exponent (31.73 becomes 16), so that under it the same is done by integer arithmetic.
"""

import triton
import triton.language as tl

NATIVE = not triton.knobs.runtime.interpret
TINY = tl.constexpr(2.0**-126)  # quantise.TINY


@triton.jit
def magnitude(x):
    """|float32| as int32, which keeps the order: infinity above all numbers, NaN above infinity. A maximum over them
    is the same in any order of threads, and forgets no NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(largest, FORMAT: tl.constexpr):
    """The scale of a block whose largest magnitude is given as int32: at least TINY, NaN where it is not finite."""
    x = largest.to(tl.float32, bitcast=True)
    if FORMAT == "e4m3":
        scale = tl.div_rn(x, tl.full(x.shape, 448.0, tl.float32))
    else:
        scale = tl.div_rn(x, tl.full(x.shape, 57344.0, tl.float32))
    return tl.where(largest >= 0x7F800000, float("nan"), tl.maximum(scale, TINY))


@triton.jit
def rounded(x, FORMAT: tl.constexpr, NATIVE: tl.constexpr):
    """float32 -> uint8: cut to the format's range, NaN as 0, to nearest, ties to even."""
    x = tl.where(x != x, 0.0, x)
    if FORMAT == "e4m3":
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)
        if NATIVE:
            return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        return rounded_by_integers(x, 7, 3)
    x = tl.minimum(tl.maximum(x, -57344.0), 57344.0)
    if NATIVE:
        return x.to(tl.float8e5).to(tl.uint8, bitcast=True)
    return rounded_by_integers(x, 15, 2)


@triton.jit
def rounded_by_integers(x, BIAS: tl.constexpr, MANTISSA: tl.constexpr):
    """Of numbers within the format's range. Half a unit of the last place, less the least bit where that place is
    even, is added before the rest is cut off. Below the least normal number the last place is the same for all: there
    float32's own addition rounds, to a number whose last place is that one."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    odd = (size >> (23 - MANTISSA)) & 1
    normal = (size + ((BIAS - 127) << 23) + (1 << (22 - MANTISSA)) - 1 + odd) >> (23 - MANTISSA)
    unit: tl.constexpr = ((127 - BIAS) + (23 - MANTISSA) + 1) << 23  # a float32 whose last place is the denormals'
    anchor = tl.full(x.shape, unit, tl.int32).to(tl.float32, bitcast=True)
    denormal = (size.to(tl.float32, bitcast=True) + anchor).to(tl.int32, bitcast=True) - unit
    result = tl.where(size < ((128 - BIAS) << 23), denormal, normal)
    return (result | ((bits >> 24) & 0x80)).to(tl.uint8)
