"""The switch for bfloat16 products: what it changes, what it leaves, and where it is refused."""

import pytest
import torch

from tasks.errors import InputError
from tlm.precision import check_precision, products

AMX = torch.cpu._is_amx_tile_supported()


def test_it_lasts_as_long_as_asked_for_and_nests():
    before = torch.get_float32_matmul_precision()
    with products("bf16"):
        with pytest.raises(KeyError, match="True"), products("fp32"):
            raise KeyError(torch.get_float32_matmul_precision() == "highest")
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.skipif(not AMX, reason="this CPU does not multiply bfloat16 in hardware (AMX)")
def test_products_of_rounded_numbers_are_summed_in_float32():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, 512, generator=generator), torch.randn(512, 64, generator=generator)
    with products("bf16"):
        product = a @ b
    rounded = a.bfloat16().double() @ b.bfloat16().double()
    assert (product - rounded).abs().max() < 1e-4  # one sum in bfloat16 would be off by 0.1
    assert (a.double() @ b.double() - rounded).abs().max() > 0.05
    with products("fp32"):
        assert (a @ b - a.double() @ b.double()).abs().max() < 1e-4


def test_refused_where_the_hardware_has_none(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    check_precision("fp32", torch.device("cpu"))
    check_precision("bf16", torch.device("cuda"))
    with pytest.raises(InputError, match="precision=bf16: .*set precision=fp32"):
        check_precision("bf16", torch.device("cpu"))
