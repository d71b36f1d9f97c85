"""Products in bfloat16 on a CPU: weights, sums and all else stay in float32, only what a product reads is rounded.

It is torch's own switch for float32 products, not autocast, which copies every weight and activation at every step and
on small models costs more than it saves. Where a CPU multiplies bfloat16 in hardware (AMX), products of a small model's
shapes take a quarter of the time; elsewhere the switch would slow them down and is refused. Each shape of a product is
compiled when it first comes (2.5 ms, as long as the product itself), so numbers of rows are rounded up to a few.
"""

import contextlib

import torch

from tasks.errors import InputError

ROWS = 64


def rounded_up(rows: int) -> int:
    """Rows to compute where products read bfloat16; otherwise none is added."""
    return -(-rows // ROWS) * ROWS if torch.get_float32_matmul_precision() == "medium" else rows


def check_precision(precision: str, device: torch.device) -> None:
    """Raises InputError for bf16 where the hardware has no such products."""
    if precision == "bf16" and device.type == "cpu" and not torch.cpu._is_amx_tile_supported():
        raise InputError("precision=bf16: this CPU does not multiply bfloat16 in hardware (AMX); set precision=fp32")


def autocasts(precision: str, device: torch.device) -> bool:
    """Whether torch's autocast to bf16 is on: on a GPU, whose recipes of tlm/lowbit leave all but their own to it."""
    return device.type == "cuda" and precision != "fp32"


@contextlib.contextmanager
def products(precision: str):
    """float32 products read "fp32" or "bf16" numbers while it lasts."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if precision == "bf16" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
