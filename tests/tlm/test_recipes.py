"""Whole runs with grown batches, averaged weights and 8-bit moments: killed and resumed, and on two processes."""

import subprocess
import sys

import pytest
from test_trainer import RUN, environment, losses, same_weights, scores

from tlm.averaging import Average
from tlm.cli import main

RECIPES = {
    "ema": ["joint.batch_ramp=0.5", "finetune.batch_ramp=0.5", "joint.average=ema", "finetune.average=ema"],
    "last": ["optimizer=adamw8bit", "model.hidden=64", "joint.batch_ramp=0.3", "joint.average=last",
             "finetune.average=last", "joint.average_share=0.5", "finetune.average_share=0.5"],
    "muon": ["deepspeed.zero_optimization.stage=1", "joint.average=ema"],
    "zero1": ["optimizer=adamw8bit", "model.hidden=64", "deepspeed.zero_optimization.stage=1", "joint.average=last"],
    "zero2": ["optimizer=adamw8bit", "model.hidden=64", "deepspeed.zero_optimization.stage=2", "joint.average=ema"],
}  # fmt: skip


@pytest.fixture
def arguments(tiny_task, tiny_corpus, tmp_path):
    return ["train", f"task={tiny_task}", f"corpus={tiny_corpus}", f"out={tmp_path}", f"cache={tmp_path}/cache", *RUN]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_killed_run_goes_on_to_the_same_end_to_the_bit(recipe, arguments, tmp_path, monkeypatch):
    arguments = [*arguments, *RECIPES[recipe]]
    assert main([*arguments, "run=whole"]) == 0
    update, calls = Average.update, []

    def dying(self, model):
        calls.append(1)
        if len(calls) in (13, 33, 60):
            raise SystemError("killed")
        update(self, model)

    monkeypatch.setattr(Average, "update", dying)
    for _ in range(3):
        with pytest.raises(SystemError):
            main([*arguments, "run=killed"])
    assert main([*arguments, "run=killed"]) == 0
    assert same_weights(tmp_path / "killed", tmp_path / "whole")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert scores(tmp_path / "killed") == scores(tmp_path / "whole")


def test_two_processes_see_the_losses_and_scores_of_one(arguments, tmp_path):
    arguments = [*arguments, *RECIPES["ema"]]
    assert main([*arguments, "run=one"]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tlm"]
    done = subprocess.run([*launcher, *arguments, "run=two"], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert (a["stage"], a["step"], a.get("tokens")) == (b["stage"], b["step"], b.get("tokens"))
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
