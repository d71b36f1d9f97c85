"""Products in bfloat16 on a CPU, and who makes those in float32.

In bfloat16 weights, sums and all else stay in float32, only what a product reads is rounded. It is torch's own switch
for float32 products, not autocast, which copies every weight and activation at every step and on small models costs
more than it saves. Where a CPU multiplies bfloat16 in hardware (AMX), products of a small model's shapes take a quarter
of the time; elsewhere the switch would slow them down and is refused.

The same switch hands products to oneDNN, which without AMX leaves them in float32. On AMD's CPUs with AVX-512 that is a
fifth faster than MKL, torch's own choice, which keeps AVX-512 to Intel's. Each shape of a product is compiled when it
first comes (2.5 ms, as long as the product itself), so numbers of rows are rounded up to a few.
"""

import contextlib
import functools

import torch

from tasks.errors import InputError

ROWS = 64
WIDE = 256  # hidden; at 128, with 512 tokens a step, compiling and the rows that are added cost a tenth of a step


def rounded_up(rows: int) -> int:
    """Rows to compute where oneDNN makes products; otherwise none is added."""
    return -(-rows // ROWS) * ROWS if torch.get_float32_matmul_precision() == "medium" else rows


def check_precision(precision: str, device: torch.device) -> None:
    """Raises InputError for bf16 where the hardware has no such products."""
    if precision == "bf16" and device.type == "cpu" and not torch.cpu._is_amx_tile_supported():
        raise InputError("precision=bf16: this CPU does not multiply bfloat16 in hardware (AMX); set precision=fp32")


def autocasts(precision: str, device: torch.device) -> bool:
    """Whether torch's autocast to bf16 is on: on a GPU, whose recipes of tlm/lowbit leave all but their own to it."""
    return device.type == "cuda" and precision != "fp32"


@functools.cache
def onednn_is_faster() -> bool:
    """Whether large float32 products are faster in oneDNN, and still float32's: one that rounding changes is looked at.

    Told by the kind of CPU, not by the clock: a run must give the same losses each time.
    """
    found, amx = torch.cpu.get_capabilities(), torch.cpu._is_amx_tile_supported()
    if amx or not found.get("avx512_bw") or "AMD" not in str(found.get("cpu_name")):
        return False
    finer = torch.full((64, 64), 1 + 2**-12)
    with products("bf16"):
        return torch.allclose(finer @ finer, finer.double().square().sum(0).float(), rtol=1e-6)


@contextlib.contextmanager
def products(precision: str, device: torch.device | None = None, hidden: int = 0):
    """float32 products read "fp32" or "bf16" numbers while it lasts. Those of a model of `hidden` on a CPU are made by
    oneDNN where that is faster."""
    wide = device is not None and device.type == "cpu" and hidden >= WIDE
    own = precision == "fp32" and wide and onednn_is_faster()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if own or precision == "bf16" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
