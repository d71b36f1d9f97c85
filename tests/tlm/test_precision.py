"""The switch for bfloat16 products: what it changes, what it leaves, and where it is refused."""

import pytest
import torch

from tasks.errors import InputError
from tlm.precision import check_precision, onednn_is_faster, products

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


@pytest.mark.skipif(AMX, reason="with AMX the switch rounds to bfloat16")
@pytest.mark.parametrize("shape", [(64, 128, 512), (2048, 256, 1024), (150, 256, 8192), (1024, 1024, 1024)])
def test_float32_products_by_onednn_are_float32s(shape):
    """Forward and both gradients; rounded to bfloat16 they would be off by 1e-3 of their size."""
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(n, generator=generator) for n in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    with products("bf16"):
        found = x @ w.T, g @ w, g.T @ x
    for one, (a, b) in zip(found, ((x, w.T), (g, w), (g.T, x)), strict=True):
        exact = a.double() @ b.double()
        assert (one - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize(
    ("name", "avx512", "amx", "faster"),
    [("AMD EPYC", True, False, True), ("AMD EPYC", False, False, False), ("Intel Xeon", True, False, False),
     ("AMD EPYC", True, True, False)],
)  # fmt: skip
def test_onednn_makes_them_on_amds_cpus_alone(name, avx512, amx, faster, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name, "avx512_bw": avx512})
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert onednn_is_faster.__wrapped__() == (faster and not AMX)
    monkeypatch.setattr(torch, "allclose", lambda *_, **__: False)  # as if oneDNN had rounded
    assert not onednn_is_faster.__wrapped__()


def test_only_products_of_wide_models_on_a_cpu_are_handed_over(monkeypatch):
    monkeypatch.setattr("tlm.precision.onednn_is_faster", lambda: True)
    for precision, device, hidden, switch in (
        ("fp32", "cpu", 256, "medium"), ("fp32", "cpu", 128, "highest"), ("fp32", "cuda", 256, "highest"),
        ("fp32", None, 256, "highest"), ("fp8-rowwise", "cpu", 256, "highest"),
    ):  # fmt: skip
        with products(precision, device and torch.device(device), hidden):
            assert torch.get_float32_matmul_precision() == switch


def test_refused_where_the_hardware_has_none(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    check_precision("fp32", torch.device("cpu"))
    check_precision("bf16", torch.device("cuda"))
    with pytest.raises(InputError, match="precision=bf16: .*set precision=fp32"):
        check_precision("bf16", torch.device("cpu"))
