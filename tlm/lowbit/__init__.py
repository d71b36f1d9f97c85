"""Training in 8 bits and fewer: number formats (quantise.py), recipes of them (recipes.py), a Linear that follows a
recipe (linear.py), scales of earlier steps (delayed.py), one call that converts a model (conversion.py), and how near
it stays, in dB (sqnr.py); a frozen base of few bits with adapters that train beside it (adapters.py).

All of it is plain torch, the slow twin of the GPU's kernels (kernels/): numbers are rounded as the hardware rounds them
and products are summed in float32, so that it shows what a recipe does to training, and saves no time.
"""

from tlm.lowbit.adapters import merge, num_parameters
from tlm.lowbit.conversion import adapt, check, check_gpu, convert, in_shape, recipe_of, take_odd, weights_as_read
from tlm.lowbit.linear import after_norm, takes_in

__all__ = [
    "adapt", "after_norm", "check", "check_gpu", "convert", "in_shape", "merge", "num_parameters", "recipe_of",
    "take_odd", "takes_in", "weights_as_read",
]  # fmt: skip
