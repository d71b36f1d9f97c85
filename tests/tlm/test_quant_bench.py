"""The forms that `tlm bench quant` makes of a run answer as the commands that make them do."""

import json

import numpy as np
import pytest

from tlm.benches import quant
from tlm.cli import main
from tlm.config import QuantConfig
from tlm.lowbit.cpu import build

RUN = [
    "model.hidden=64", "model.layers=2", "model.heads=2", "model.intermediate=64", "model.max_length=32",
    "tokenizer.vocabulary=400", "joint.steps=20", "joint.batch=8", "joint.eval_every=0", "init=random",
    "finetune.steps=4", "finetune.batch=8", "finetune.eval_every=2", "threads=1", "boards=[]",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny_task, tmp_path_factory):
    """One in fp32, one ternary."""
    out = tmp_path_factory.mktemp("runs")
    for precision in ("fp32", "ternary"):
        names = [f"task={tiny_task}", f"out={out}", f"cache={out}/cache", f"run={precision}"]
        assert main(["train", *names, *RUN, f"precision={precision}"]) == 0
    return out


pytestmark = pytest.mark.usefixtures("in_this_process")


def test_scores_are_those_of_tlm_eval_and_files_shrink(runs, tmp_path, capsys):
    for module in ("bitsandbytes", "onnx", "onnxruntime"):
        pytest.importorskip(module)
    out = tmp_path / "quant.json"
    given = [f"runs=[{runs / 'fp32'},{runs / 'ternary'}]", "batch=[1,5]", "threads=1", "seconds=0", f"out={out}"]
    assert main(["bench", "quant", *given]) == 0
    assert "texts/s" in json.dumps(json.loads(out.read_text()))
    rows = json.loads(out.read_text())["rows"]
    found = {(row["case"], row["engine"], row["metric"]): row["value"] for row in rows}
    for run, form, keys in (
        ("fp32", "fp32", []), ("fp32", "int8", ["precision=int8"]), ("fp32", "nf4", ["precision=nf4"]),
        ("ternary", "fp32", []), ("ternary", "ternary", ["precision=ternary"]),
    ):  # fmt: skip
        capsys.readouterr()
        assert main(["eval", str(runs / run), "threads=1", *keys]) == 0
        scores = json.loads(capsys.readouterr().out)
        for metric in ("accuracy", "calibration_error", "loss"):
            assert found[run, form, metric] == pytest.approx(scores[metric], abs=1e-5), (run, form, metric)
    files = {form: found["fp32", form, "file"] for form in quant.FORMS}
    assert files["ternary"] < files["nf4"] < files["int8"] < files["onnx-int8"] < files["fp32"]
    assert {engine for case, engine, _ in found if case == "ternary"} == {"fp32", "ternary"}
    assert found["fp32", "fp32", "answers of fp32"] == 1
    for form in quant.FORMS:
        assert found["fp32", form, "1 texts"] > 0
        assert found["fp32", form, "throughput"] > 0


def test_onnx_answers_padded_texts_as_the_model_does(runs, tmp_path):
    for module in ("onnx", "onnxruntime"):
        pytest.importorskip(module)
    texts = [np.arange(2, 14), np.arange(5, 30), np.arange(9, 12)]
    plain, theirs = (
        quant.opened(quant.write(runs / "fp32", form, tmp_path / form), 1) for form in ("fp32", "onnx-int8")
    )  # fmt: skip
    exact = plain(texts)
    assert np.abs(theirs(texts) - exact).max() < 0.1 * np.abs(exact).max()
    assert np.allclose(quant.probabilities(plain, texts).sum(1), 1)


def test_ternary_of_an_fp32_run_has_three_values_a_matrix(runs, tmp_path):
    if build.kernels() is None:
        pytest.skip(str(build.find()))
    small = quant.write(runs / "fp32", "ternary", tmp_path / "small")
    assert small.stat().st_size < quant.write(runs / "fp32", "fp32", tmp_path / "whole").stat().st_size
    assert quant.opened(small, 1)([np.arange(2, 14)]).shape == (1, 3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "runs=: missing; `tlm bench quant runs=...` needs it"),
        (["runs=[nowhere]"], "nowhere: no such run"),
        (
            ["runs=[{run}]", "forms=[int4]"],
            "forms=[int4]: no such form; use some of fp32, int8, nf4, ternary, onnx-int8",
        ),
        (["runs=[{run}]", "batch=[500]"], "has 30 dev texts, fewer than batch=[500] asks for at once"),
    ],
)
def test_bad_input_is_one_sentence(given, said, runs, capsys):
    assert main(["bench", "quant", *(g.format(run=runs / "fp32") for g in given), "threads=1"]) == 2
    assert said in capsys.readouterr().err


def test_what_is_not_installed_is_left_out(runs, monkeypatch):
    monkeypatch.setattr(quant.importlib.util, "find_spec", lambda name: None)
    model = quant.load_model(runs / "fp32" / "model")
    assert quant.forms_of(model, QuantConfig().forms) == ["fp32", "int8", "ternary"]
