"""`tlm bench lowbit` plans runs that differ by precision and seed alone, and tells what is between them and fp32."""

import json

import pytest

from tlm.benches import lowbit
from tlm.cli import main
from tlm.run import read_json

SMALL = (
    "[model.hidden=32,model.layers=2,model.heads=2,model.intermediate=48,model.max_length=32,tokenizer.vocabulary=400,"
    "joint.held_out=20]"
)
LOSSES = {"fp32": (4.0, 5.0), "mxfp8": (4.04, 4.95)}  # by seed
DEV = {"fp32": (0.5, 0.7), "mxfp8": (0.6, 0.7)}


@pytest.fixture
def arguments(tiny_task, tiny_corpus, tmp_path):
    names = [f"task={tiny_task}", f"corpus={tiny_corpus}", f"out={tmp_path}/lowbit", f"cache={tmp_path}/cache"]
    return ["bench", "lowbit", *names, "recipes=[mxfp8]", f"settings={SMALL}", "budget=2e9", "jobs=1"]


def test_gaps_are_those_of_each_seed(arguments, tmp_path, monkeypatch, capsys):
    """Runs that are made up."""

    def queue(runs, jobs, progress):
        for run in runs:
            (precision,) = [s.removeprefix("precision=") for s in run.settings if s.startswith("precision=")]
            run.folder.mkdir(parents=True)
            cost = {"seconds": {"joint": 2.0 if precision == "fp32" else 5.0, "finetune": 1.0, "retrieval": 9.0}}
            summary = {"metric": "macro_f1", "dev": {"macro_f1": DEV[precision][run.seed]}, "cost": cost}
            (run.folder / "summary.json").write_text(json.dumps(summary))
            (run.folder / "env.json").write_text('{"git_commit": "abc"}')
            lines = [{"kind": "spike", "stage": "joint", "step": 3}] * (precision == "mxfp8" and run.seed)
            lines.append({"kind": "held_out", "stage": "joint", "step": 9, "mlm_loss": LOSSES[precision][run.seed]})
            (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(lowbit, "queue", queue)
    assert main([*arguments, "seeds=2"]) == 0
    found = read_json(tmp_path / "lowbit" / "lowbit.json")
    values = {row["recipe"]: row for row in found["by_seed"]}
    assert values["mxfp8"]["loss gap"] == pytest.approx([0.01, -0.01])
    assert values["mxfp8"]["dev gap"] == pytest.approx([0.1, 0])
    assert values["mxfp8"]["time"] == [2, 2]
    assert values["fp32"]["loss"] == [4, 5]
    assert (values["fp32"]["spikes"], values["mxfp8"]["spikes"]) == ([0, 0], [0, 1])
    said = capsys.readouterr().out
    assert "+0.00% ±1.41%" in said
    assert "+5.0% ±7.1%" in said
    assert len(found["runs"]) == 4


def test_runs_are_made_once_and_see_the_same(arguments, tmp_path, capsys):
    assert main([*arguments, "seeds=1"]) == 0
    folders = {name: tmp_path / "lowbit" / "tiny_task0" / f"{name}-0" for name in ("fp32", "mxfp8")}
    tokens = {read_json(folder / "summary.json")["cost"]["tokens"] for folder in folders.values()}
    assert len(tokens) == 1
    assert all(read_json(folder / "summary.json")["test"] is None for folder in folders.values())
    before = {name: (folder / "summary.json").stat().st_mtime_ns for name, folder in folders.items()}
    capsys.readouterr()
    assert main([*arguments, "seeds=1"]) == 0
    assert "loss gap" in capsys.readouterr().out
    assert before == {name: (folder / "summary.json").stat().st_mtime_ns for name, folder in folders.items()}
    (gap,) = read_json(tmp_path / "lowbit" / "lowbit.json")["by_seed"][1]["loss gap"]
    assert 0 < abs(gap) < 0.05


def test_a_pool_is_one_task_more(arguments, pool_folder, tmp_path, jobs_here):
    settings = SMALL.replace("joint.held_out=20", "joint.batch_tokens=256")
    assert main([*arguments, "seeds=1", f"pool={pool_folder}", f"settings={settings}"]) == 0
    rows = {(row["task"], row["recipe"]): row for row in read_json(tmp_path / "lowbit" / "lowbit.json")["by_seed"]}
    assert len(rows) == 4
    (gap,) = rows[str(pool_folder), "mxfp8"]["loss gap"]
    assert 0 < abs(gap) < 0.05
    for recipe in ("fp32", "mxfp8"):
        folder, row = tmp_path / "lowbit" / pool_folder.name / f"{recipe}-0", rows[str(pool_folder), recipe]
        scores = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        last = [score for score in scores if score["kind"] == "dev"][-1]
        assert row["loss"] == [last["loss"]]
        assert row["dev"] == [read_json(folder / "summary.json")["dev"]["token_accuracy"]]
        assert last["step"] == [score["step"] for score in scores if score["kind"] == "train"][-1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["recipes=[nf4]"], "recipes=[nf4]: no recipe to train by; use some of fp8-tensorwise, "),
        (
            ["settings=[precision=int8]"],
            "settings=[precision=int8]: precision is not to be set here",
        ),
        (["corpus=''"], "corpus=: missing"),
        (["task=[a/x.csv,b/x.csv]"], "task=[a/x.csv, b/x.csv]: two of them have one name"),
    ],
)
def test_bad_input_is_one_sentence(given, said, arguments, tmp_path, capsys):
    assert main([*arguments, *given]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "lowbit").exists()
