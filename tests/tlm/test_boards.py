"""Curves beside metrics.jsonl: what each board holds after two stages and a resume, and what is refused."""

import json
import math
import os
import re
import struct
import subprocess
import sys

import pytest

from tasks.errors import InputError
from tlm.boards import check_boards, open_boards
from tlm.cli import main
from tlm.config import TrainConfig, load, validate
from tlm.trainer import Loop

WITHOUT_MLFLOW = "mlflow is in the extra `boards` alone: 25 packages, 3 seconds to import"


@pytest.fixture
def config():
    return validate(load(TrainConfig, ["task=tiny", "joint.steps=20"]))


def two_stages_and_a_resume(kind, folder, config):
    """The joint stage is killed after step 20 and goes on from step 10."""
    folder.mkdir()
    for stage, start in (("joint", 0), ("joint", 10), ("finetune", 0)):
        boards = open_boards([kind], folder, stage, config, start)
        for step in range(start + 10, 30, 10):
            boards.write({"loss": 1 / step, "mlm_loss": None}, step)
        boards.close()


def test_tensorboard_hides_what_a_kill_left_behind(config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    two_stages_and_a_resume("tensorboard", tmp_path / "run", config)
    for stage in ("joint", "finetune"):
        events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / stage)).Reload()
        assert events.Tags()["scalars"] == ["loss"]
        assert [event.step for event in events.Scalars("loss")] == [10, 20]


def wandb_history(path):
    """(step, values) of each line of an offline run: protocol buffers in LevelDB's log format, after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, whole, lines = path.read_bytes(), 7, b"", []
    while place < len(content):
        if (left := 2**15 - place % 2**15) < 7:  # the rest of a block that is too short for a header
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # all of a record, or its last piece
            record, whole = Record.FromString(whole), b""
            if record.WhichOneof("record_type") == "history":
                items = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
                lines.append((record.history.step.num, {k: v for k, v in items.items() if not k.startswith("_")}))
    return lines


def wandb_files(run):
    """Oldest first. The process that writes them is done once it has ended, as it does at the end of ours."""
    import wandb

    wandb.teardown()
    return sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.parent.name)


def test_wandb_is_one_run_over_both_stages_and_a_resume(config, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    two_stages_and_a_resume("wandb", tmp_path / "run", config)
    files = wandb_files(tmp_path / "run")
    assert len({path.name for path in files}) == 1  # run-IDENTIFIER.wandb
    assert [wandb_history(path) for path in files] == [
        [(10, {"joint/loss": 0.1}), (20, {"joint/loss": 0.05})],
        [(20, {"joint/loss": 0.05})],  # the server has it already
        [(30, {"finetune/loss": 0.1}), (40, {"finetune/loss": 0.05})],
    ]


def test_wandb_without_a_key_says_what_to_do(tmp_path):
    """In a process of its own, as wandb reads the environment once."""
    pytest.importorskip("wandb")
    code = (
        "from pathlib import Path; from tlm.boards import open_boards; from tlm.config import TrainConfig\n"
        "open_boards(['wandb'], Path('.'), 'joint', TrainConfig(), 0)"
    )
    without = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {"HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=without,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert "InputError: boards=wandb: refused" in done.stderr
    assert "set WANDB_MODE=offline" in done.stderr


def test_mlflow_is_one_run_without_repeats(config, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason=WITHOUT_MLFLOW)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    two_stages_and_a_resume("mlflow", tmp_path / "run", config)
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "run" / "mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("tlm").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["joint.steps"] == "20"
    for name, steps in (("joint/loss", [10, 20]), ("finetune/loss", [30, 40])):
        assert [metric.step for metric in client.get_metric_history(run.info.run_id, name)] == steps


def test_mlflow_that_does_not_answer_is_refused_before_training(config, tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason=WITHOUT_MLFLOW)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI"):
        open_boards(["mlflow"], tmp_path, "joint", config, 0)


def test_no_boards_leave_no_files(config, tmp_path):
    boards = open_boards([], tmp_path, "joint", config, 0)
    boards.write({"loss": 1.0}, 10)
    boards.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "package"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny")])
def test_a_missing_package_is_told_before_anything_is_done(kind, package, tiny_task, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, kind, None)
    assert main(["train", f"task={tiny_task}", f"out={tmp_path}", f"cache={tmp_path}", f"boards={kind}"]) == 2
    assert f"boards={kind}: {package} is missing; pip install {package}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_of_the_packages_name_is_not_the_package(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "wandb").mkdir()
    with pytest.raises(InputError, match="pip install wandb"):
        check_boards(["wandb"])
    sys.modules.pop("wandb", None)


def test_a_run_writes_both_stages_and_its_money(tiny_task, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    small = "model.hidden=32 model.layers=1 model.heads=2 model.intermediate=32 tokenizer.vocabulary=200 threads=1"
    steps = "joint.steps=10 joint.batch=4 joint.eval_every=10 finetune.steps=10 finetune.batch=4 finetune.eval_every=10"
    where = [f"task={tiny_task}", f"out={tmp_path}", f"cache={tmp_path / 'cache'}", "run=one"]
    assert main(["train", *where, *small.split(), *steps.split(), "boards=[wandb]", "price_per_hour=3600"]) == 0
    (joint,), (beginning, finetune) = map(wandb_history, wandb_files(tmp_path / "one"))
    assert (joint[0], beginning[0], finetune[0]) == (10, 10, 20)
    assert {"joint/mlm_loss", "joint/lr", "joint/mfu"} < joint[1].keys()
    assert "finetune/dev_macro_f1" in beginning[1]  # of the joint stage's last weights
    assert {"finetune/dev_macro_f1", "finetune/task_loss", "finetune/grad_norm"} < finetune[1].keys()
    assert not (tmp_path / "one" / "tensorboard").exists()
    cost = json.loads((tmp_path / "one" / "summary.json").read_text())["cost"]
    assert cost["money"] == pytest.approx(sum(cost["seconds"].values()), abs=0.01)


def test_a_loss_spike_is_on_the_board_and_in_the_report(tiny_task, tmp_path, monkeypatch, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    gradients = Loop.gradients

    def poisoned(loop, micros):
        loss, norm, amounts = gradients(loop, micros)
        return (math.nan if loop.stage.step == 4 and loop.stage.name == "joint" else loss), norm, amounts

    monkeypatch.setattr(Loop, "gradients", poisoned)
    small = "model.hidden=32 model.layers=1 model.heads=2 model.intermediate=32 tokenizer.vocabulary=200 threads=1"
    steps = "joint.steps=20 joint.batch=4 joint.eval_every=10 finetune.steps=20 finetune.batch=4 finetune.eval_every=10"
    where = [f"task={tiny_task}", f"out={tmp_path}", f"cache={tmp_path / 'cache'}", "run=one", "spike=skip"]
    assert main(["train", *where, *small.split(), *steps.split()]) == 0
    events = EventAccumulator(str(tmp_path / "one" / "tensorboard" / "joint")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("spike")] == [(5, 1.0)]
    assert [event.step for event in events.Scalars("spike_grad_norm")] == [5]
    assert [event.step for event in events.Scalars("loss")] == [10, 20]
    assert "spike_loss" not in events.Tags()["scalars"]  # it was no number

    assert main(["report", str(tmp_path / "one"), f"out={tmp_path / 'page.html'}"]) == 0
    page = (tmp_path / "page.html").read_text()
    for title in ("Total loss", "Learning rate", "Gradient norm", "Throughput"):
        assert re.search(rf"{title}[^.]* over the optimizer steps: one from [^\"]* Loss spikes: 1\.", page), title
