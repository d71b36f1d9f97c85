"""Three operations that Numba has no words for, as LLVM code: it makes of them what the processor has.

`add_rows` is where searching spends its time: many queries at once, each a lane of 16 bits. With AVX-512 a step of 32
lanes is two instructions, and sums stay in registers until they are compared with the queries' floors.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

TILE = 128  # queries whose sums are in registers together
_LANES = 32
_VECTORS = TILE // _LANES
MASKS = TILE // 64  # words uint64 that tell a tile's lanes apart

_I16, _I32, _I64 = (ir.IntType(bits) for bits in (16, 32, 64))
_VECTOR = ir.VectorType(_I16, _LANES)
_WIDE = ir.VectorType(_I32, _LANES)


def _spread(builder, value, kind):
    """A vector of `kind` with `value` in all lanes."""
    undefined = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(_I32, kind.count), [0] * kind.count))


@intrinsic
def add_rows(typing, sums, rows, numbers, factors, count, floors, masks):
    """sums += (rows[number] * factor) >> 16 over `count` (number, factor) pairs, at most 65,535; then sums = 0.

    Addresses of sums uint16[TILE], rows uint16[.., TILE], numbers and factors uint32[count], floors uint16[TILE] and
    masks uint64[MASKS], where the bit of each lane is set whose sum has reached its floor.
    """

    def generate(context, builder, signature, arguments):
        sums, rows, numbers, factors, count, floors, masks = arguments
        add = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_VECTOR, [_VECTOR, _VECTOR]), f"llvm.uadd.sat.v{_LANES}i16"
        )

        def vector(base, i):
            return builder.gep(builder.inttoptr(base, _VECTOR.as_pointer()), [_I64(i)])

        def word(base, index):
            return builder.load(builder.gep(builder.inttoptr(base, _I32.as_pointer()), [index]))

        registers = [cgutils.alloca_once(builder, _VECTOR) for _ in range(_VECTORS)]
        for i, register in enumerate(registers):
            builder.store(builder.load(vector(sums, i), align=2), register)
            builder.store(ir.Constant(_VECTOR, [0] * _LANES), vector(sums, i), align=2)
        shift = ir.Constant(_WIDE, [16] * _LANES)
        with cgutils.for_range(builder, count) as loop:
            number = builder.zext(word(numbers, loop.index), _I64)
            row = builder.add(rows, builder.mul(number, _I64(2 * TILE)))
            factor = builder.zext(_spread(builder, builder.trunc(word(factors, loop.index), _I16), _VECTOR), _WIDE)
            for i, register in enumerate(registers):
                product = builder.mul(builder.zext(builder.load(vector(row, i), align=2), _WIDE), factor)
                high = builder.trunc(builder.lshr(product, shift), _VECTOR)
                builder.store(builder.call(add, [builder.load(register), high]), register)
        bits = builder.inttoptr(masks, _I32.as_pointer())
        for i, register in enumerate(registers):
            reached = builder.icmp_unsigned(">=", builder.load(register), builder.load(vector(floors, i), align=2))
            builder.store(builder.bitcast(reached, _I32), builder.gep(bits, [_I64(i)]))
        return context.get_dummy_value()

    address = types.intp
    return types.void(address, address, address, address, types.int64, address, address), generate


@intrinsic
def lowest_bit(typing, word):
    """Number of the lowest bit set in a uint64 that is not 0."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@intrinsic
def word_at(typing, address):
    """The four bytes at an address, wherever it lies, as a uint32 (the lowest byte first)."""

    def generate(context, builder, signature, arguments):
        return builder.load(builder.inttoptr(arguments[0], _I32.as_pointer()), align=1)

    return types.uint32(types.intp), generate
