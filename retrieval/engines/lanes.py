"""Three operations that Numba has no words for, as LLVM code: it makes of them what the processor has.

`add_rows` is where searching spends its time: many queries at once, each a lane of 8 bits. With AVX-512 a step of 64
lanes is one instruction that reads and adds, and sums stay in registers until they are compared with the floors.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

TILE = 256  # queries whose sums are in registers together
_LANES = 64
_VECTORS = TILE // _LANES
MASKS = TILE // 64  # words uint64 that tell a tile's lanes apart

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_VECTOR = ir.VectorType(_I8, _LANES)
_WIDE = ir.VectorType(_I16, _LANES)


def _half(builder, vector):
    """Half of each lane, rounded up."""
    wide = builder.add(builder.zext(vector, _WIDE), ir.Constant(_WIDE, [1] * _LANES))
    return builder.trunc(builder.lshr(wide, ir.Constant(_WIDE, [1] * _LANES)), _VECTOR)


@intrinsic
def add_rows(typing, sums, rows, wholes, num_wholes, halves, num_halves, quarters, num_quarters, floors, masks):
    """sums += the rows of some numbers, halves of others and quarters of others, rounded up; then sums = 0.

    Addresses of sums uint8[TILE], rows uint8[.., TILE], numbers uint32[num_..], floors uint8[TILE] and masks
    uint64[MASKS], where the bit of each lane is set whose sum has reached its floor. Sums stop at 255.
    """

    def generate(context, builder, signature, arguments):
        sums, rows, *lists, floors, masks = arguments
        add = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_VECTOR, [_VECTOR, _VECTOR]), f"llvm.uadd.sat.v{_LANES}i8"
        )

        def vector(base, i):
            return builder.gep(builder.inttoptr(base, _VECTOR.as_pointer()), [_I64(i)])

        registers = [cgutils.alloca_once(builder, _VECTOR) for _ in range(_VECTORS)]
        for i, register in enumerate(registers):
            builder.store(builder.load(vector(sums, i), align=1), register)
            builder.store(ir.Constant(_VECTOR, [0] * _LANES), vector(sums, i), align=1)
        for halvings, (numbers, count) in enumerate(zip(lists[::2], lists[1::2], strict=True)):
            with cgutils.for_range(builder, count) as loop:
                number = builder.load(builder.gep(builder.inttoptr(numbers, _I32.as_pointer()), [loop.index]))
                row = builder.add(rows, builder.mul(builder.zext(number, _I64), _I64(TILE)))
                for i, register in enumerate(registers):
                    addend = builder.load(vector(row, i), align=1)
                    for _ in range(halvings):
                        addend = _half(builder, addend)
                    builder.store(builder.call(add, [builder.load(register), addend]), register)
        bits = builder.inttoptr(masks, _I64.as_pointer())
        for i, register in enumerate(registers):
            reached = builder.icmp_unsigned(">=", builder.load(register), builder.load(vector(floors, i), align=1))
            builder.store(builder.bitcast(reached, _I64), builder.gep(bits, [_I64(i)]))
        return context.get_dummy_value()

    address = types.intp
    return types.void(*[address] * 10), generate


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
