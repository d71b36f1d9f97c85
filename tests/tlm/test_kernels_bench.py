"""The contestants of `tlm bench kernels` compute the same thing, and what is reported is what was measured."""

import json
from functools import partial

import pytest
import torch

from tasks.errors import InputError
from tlm.benches import kernels, rounds
from tlm.cli import main
from tlm.config import KernelsConfig
from tlm.lowbit.cpu import build
from tlm.lowbit.sqnr import sqnr_db

SMALL = KernelsConfig(rows=[1, 5], hidden=[32], size="tiny", batch=[1, 2], length=12, vocabulary=300, parameters=[1])


@pytest.fixture(autouse=True)
def compiled():
    if build.kernels() is None:
        pytest.skip(str(build.find()))


def test_products_are_those_of_fp32_but_for_rounding():
    w, x = (torch.randn(n, 64, generator=torch.Generator().manual_seed(n)) for n in (96, 7))
    for make, floor in ((kernels.by_torch_int8, 25), (partial(kernels.by_kernel, precision="int8"), 35)):
        assert sqnr_db(kernels.by_torch(w)(x), make(w)(x)) > floor


def test_a_turn_tells_the_time_of_each_shape():
    turns = kernels.products(SMALL, kernels.by_torch)
    assert next(turns) is None  # before anything is made
    taken = next(turns)
    assert list(taken) == ["1 x 32 x 96", "5 x 32 x 96"]
    assert all(0 < seconds < 0.02 for seconds in taken.values())


def test_models_agree_and_onnx_is_given_the_same_texts():
    plain, int8 = (kernels.by_model(SMALL, change) for change in (partial(kernels.start_model, SMALL), lambda: small))
    small = kernels.packed(SMALL, "int8")
    assert [next(plain), next(int8)] == [None, None]
    assert list(next(plain)) == list(next(int8)) == ["1 texts", "2 texts"]
    assert kernels.texts(SMALL, 2).shape == (2, 12)


def test_optimizers_keep_8_and_2_03_bytes_a_parameter():
    for kind, kept in ((kernels.fused, 8), (kernels.eight_bits, 2 + 8 / 256)):
        turns = kernels.steps(1, kind)
        next(turns)
        taken = next(turns)
        assert taken["state"] == pytest.approx(kept, abs=1e-4)
        assert taken["1M"] > 0


def test_medians_of_times_and_of_ratios_of_a_round():
    records = {
        "base": rounds.Record([{"a": 2.0}, {"a": 4.0}, {"a": 60.0}]),
        "ours": rounds.Record([{"a": 1.0}, {"a": 1.0}, {"a": 10.0}]),
    }
    rows = list(kernels.times("linear", records, "base", "us"))
    found = {(row["engine"], row["metric"]): row["value"] for row in rows}
    assert found["ours", "time"] == 1e6
    assert found["ours", "speed beside base"] == 4
    assert {row["case"] for row in rows} == {"linear a"}


def test_the_command_writes_what_it_shows(tmp_path, in_this_process, capsys):
    out = tmp_path / "kernels.json"
    assert main(["bench", "kernels", "cases=[linear]", "rows=[2]", "hidden=[32]", "threads=1", f"out={out}"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {"torch fp32", "torch int8", "tlm int8", "tlm ternary", "tlm binary"} <= {row["engine"] for row in rows}
    smaller = {r["engine"]: r["value"] for r in rows if r["metric"].startswith("fp32 weights")}
    assert smaller["tlm ternary"] > 3
    assert "speed beside torch fp32" in capsys.readouterr().out


def test_an_unknown_case_is_one_sentence(capsys):
    assert main(["bench", "kernels", "cases=[products]"]) == 2
    assert "cases=[products]: no such case; use some of linear, model, adamw" in capsys.readouterr().err


def test_bytes_of_torchaos_state_are_those_that_it_holds():
    """It says that it is float32: 4 bytes a number."""
    subclass = pytest.importorskip("torchao.optim.subclass_8bit", reason="torchao is not installed")
    state = subclass.OptimState8bit.zeros((4096,), signed=True, block_size=256)
    assert state.dtype == torch.float32
    assert kernels.num_bytes(state) == 4096 + 4 * 4096 / 256


def test_what_is_asked_for_and_missing_is_one_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.optim", None)
    with pytest.raises(InputError, match="torchao=true: torchao is missing; pip install torchao"):
        kernels.torchao()
