"""Matrices of 8, 2 and 1 bits a weight, as inference reads them, and the Linear over them. Legend: N rows, K inputs, O
outputs.

`linear` is the kernel (linear.cpp), `linear_by_torch` its slow twin, from the same packed bytes: the same sums to the
bit, and what follows them too, but for the activation (within 1e-6).
"""

import ctypes
from collections import Counter
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from tlm.lowbit.cpu.build import kernels
from tlm.lowbit.quantise import INT8, ROW, TINY, Cast, Quantised

LANES = 16  # outputs of a panel
MEANS = {8: (1, -128), 2: (1, -1), 1: (2, -1)}  # bits: a code c stands for factor * c + shift
ACTIVATIONS = ("none", "gelu", "geglu")
ROWS = Cast(INT8, ROW)


@dataclass(frozen=True)
class Packed:
    """panels: uint8 [halves * O / 16, K / step, 16, 4], where a byte holds the codes of 8 / bits inputs that are 4
    apart (step: 4 * 8 / bits); scales: float32 [halves * panels' outputs]; bias likewise or None.

    Two halves are value and gate of a gated MLP, each filled up to whole panels.
    """

    panels: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    bits: int
    inputs: int
    outputs: int  # of a half
    halves: int = 1

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for t in (self.panels, self.scales, self.bias) if t is not None)


def step(bits: int) -> int:
    """Inputs of a line of 64 bytes."""
    return 4 * (8 // bits)


def pack(weight: Quantised, bits: int, bias: torch.Tensor | None = None, halves: int = 1) -> Packed:
    """`weight`: int8 [halves * O, K] with a scale for each output, or for all."""
    factor, shift = MEANS[bits]
    codes = ((weight.values.int() - shift) // factor).to(torch.uint8)
    outputs, inputs = weight.values.shape[0] // halves, weight.values.shape[1]
    codes = F.pad(codes.view(halves, outputs, inputs), (0, -inputs % step(bits), 0, -outputs % LANES))
    # [halves, panels, 16, lines, codes of a byte, 4]
    codes = codes.reshape(halves, -1, LANES, codes.shape[2] // step(bits), 8 // bits, 4)
    shifts = bits * torch.arange(8 // bits, dtype=torch.uint8)
    bytes_ = (codes << shifts[:, None]).sum(4).to(torch.uint8)  # [halves, panels, 16, lines, 4]
    panels = bytes_.transpose(2, 3).flatten(0, 1).contiguous()

    def filled(of_outputs: torch.Tensor) -> torch.Tensor:
        return F.pad(of_outputs.float().view(halves, outputs), (0, -outputs % LANES)).flatten()

    scales = filled(weight.scales.expand(halves * outputs, 1).contiguous())
    return Packed(panels, scales, None if bias is None else filled(bias), bits, inputs, outputs, halves)


def unpack(packed: Packed) -> torch.Tensor:
    """int8 [halves * O, K], as it was packed."""
    factor, shift = MEANS[packed.bits]
    shifts = packed.bits * torch.arange(8 // packed.bits, dtype=torch.uint8)
    lines = packed.panels.transpose(1, 2)[:, :, :, None, :]  # [panels, 16, lines, 1, 4]
    codes = (lines >> shifts[:, None]) & (2**packed.bits - 1)
    values = (factor * codes.int() + shift).to(torch.int8).flatten(2).view(packed.halves, -1, codes[0, 0].numel())
    return values[:, : packed.outputs, : packed.inputs].flatten(0, 1)


def linear(
    x: torch.Tensor,
    packed: Packed,
    activation: str = "none",
    odd: Counter | None = None,
    instructions: str | None = None,
) -> torch.Tensor:
    """float32 [N, K] -> [N, O]: rows of x in int8, the product, scales, bias, and gelu, or geglu of two halves.

    `odd` counts rows that no scale fits. Where there are no kernels it is the twin.
    """
    library = kernels(instructions)
    if library is None:
        return linear_by_torch(x, packed, activation, odd)
    assert x.dtype == torch.float32 and x.shape[1] == packed.inputs, (x.dtype, x.shape)  # noqa: PT018
    assert (activation == "geglu") == (packed.halves == 2), activation
    x, rows, padded = x.contiguous(), len(x), packed.panels.shape[1] * step(packed.bits)
    out = torch.empty(rows, packed.outputs)
    room = torch.empty(rows * (padded + 8), dtype=torch.uint8)  # one for all, as a small product takes microseconds
    found = (ctypes.c_int64 * 2)()
    scales = room.data_ptr() + rows * padded  # padded is a multiple of 4
    library.tlm_linear(
        packed.bits, x.data_ptr(), rows, packed.inputs, padded, packed.panels.data_ptr(), packed.scales.data_ptr(),
        None if packed.bias is None else packed.bias.data_ptr(), packed.outputs, ACTIVATIONS.index(activation),
        out.data_ptr(), room.data_ptr(), scales, scales + 4 * rows, torch.get_num_threads(), found,
    )  # fmt: skip
    if odd is not None and any(found):
        count(odd, *found)
    return out


def linear_by_torch(
    x: torch.Tensor, packed: Packed, activation: str = "none", odd: Counter | None = None
) -> torch.Tensor:
    """The same, slowly: integers are summed as float64, which is exact."""
    rows = ROWS(x)
    if odd is not None:
        count(odd, int((rows.scales == TINY).sum()), int(rows.scales.isnan().sum()))
    sums = (rows.values.double() @ unpack(packed).double().T).float()
    of_outputs = [
        None if t is None else t.view(packed.halves, -1)[:, : packed.outputs].flatten()
        for t in (packed.scales, packed.bias)
    ]
    out = sums * (rows.scales * of_outputs[0])
    out = out if packed.bias is None else out + of_outputs[1]
    if activation == "geglu":
        value, gate = out.chunk(2, -1)
        return F.gelu(value) * gate
    return F.gelu(out) if activation == "gelu" else out


def count(odd: Counter, zeros: int, broken: int) -> None:
    if zeros:
        odd["input zero blocks"] += zeros
    if broken:
        odd["input blocks with NaN or infinity"] += broken
