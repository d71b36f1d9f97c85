"""Which numbers the products of a Linear read, by name. All weights, sums and gradients stay in float32 beside them.

A Linear has three products, and each reads its two operands with blocks that lie along its sum: the output (inputs and
weights, over features), the input's gradient (the output's gradients and weights, over outputs) and the weight's
gradient (the output's gradients and inputs, over tokens). A matrix that stands in two of them is quantised twice.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tlm.lowbit.quantise import E4M3, E5M2, INT8, ROW, TENSOR, Cast, Quantised, binary, ternary


@dataclass(frozen=True)
class Recipe:
    """`gradient` None: a straight-through estimator. Both gradients are then float32 products with the operands as the
    forward pass read them, as if these had not been rounded."""

    inputs: Cast
    weight: Callable[..., Quantised]
    gradient: Cast | None
    stochastic: bool = False  # rounding of the gradients
    delayed: bool = False  # scales by the largest magnitudes of earlier steps (delayed.py)

    @property
    def in_the_weights(self) -> bool:
        """Whether the model is the rounded weights, and means nothing without the rounding."""
        return self.gradient is None


ACROSS_32 = Cast(E4M3, (1, 32), power_of_two=True)
ACROSS_128 = Cast(E4M3, (1, 128))

RECIPES = {
    "fp8-tensorwise": Recipe(Cast(E4M3, TENSOR), Cast(E4M3, TENSOR), Cast(E5M2, TENSOR)),
    "fp8-delayed": Recipe(Cast(E4M3, TENSOR), Cast(E4M3, TENSOR), Cast(E5M2, TENSOR), delayed=True),
    "fp8-rowwise": Recipe(Cast(E4M3, ROW), Cast(E4M3, ROW), Cast(E5M2, ROW)),
    "fp8-blockwise": Recipe(ACROSS_128, Cast(E4M3, (128, 128)), ACROSS_128),  # DeepSeek-V3 (arXiv 2412.19437)
    "mxfp8": Recipe(ACROSS_32, ACROSS_32, ACROSS_32),  # OCP Microscaling Formats v1.0
    # Only gradients are added up over steps, where the bias of rounding to nearest would add up with them.
    "int8": Recipe(Cast(INT8, ROW), Cast(INT8, ROW), Cast(INT8, ROW), stochastic=True),
    "ternary": Recipe(Cast(INT8, ROW), ternary, None),
    "binary": Recipe(Cast(INT8, ROW), binary, None),
}
