"""Finetuning a checkpoint of transformers: a run folder like any other, the same twice, and what is refused."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tlm.cli import main
from tlm.hf import Counter


def train(checkpoint, task, out, *settings):
    given = [f"task={task}", f"init_from=hf:{checkpoint}", f"out={out}", "run=hf", "threads=1", "finetune.batch=16",
             "finetune.steps=80", "finetune.eval_every=20", "finetune.lr=1e-2", *settings]  # fmt: skip
    return main(["train", *given])


def test_it_learns_and_leaves_what_other_runs_leave(checkpoint, tiny_task, tmp_path):
    assert train(checkpoint, tiny_task, tmp_path / "a") == 0
    assert train(checkpoint, tiny_task, tmp_path / "b") == 0
    one, other = (json.loads((tmp_path / name / "hf" / "summary.json").read_text()) for name in "ab")
    assert one["test"]["macro_f1"] > 0.6  # of three labels
    assert one["test"] == other["test"]
    assert one["cost"]["flops"] > 0
    records = [json.loads(line) for line in (tmp_path / "a" / "hf" / "metrics.jsonl").read_text().splitlines()]
    assert max(r["macro_f1"] for r in records if r["kind"] == "dev") == one["dev"]["macro_f1"]
    assert [r["flops"] for r in records if r["kind"] == "train"][-1] == one["cost"]["flops"]
    assert len((tmp_path / "a" / "hf" / "predictions.jsonl").read_text().splitlines()) == 45


def test_flops_are_those_of_a_counted_training_step(checkpoint):
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3)
    batch = {"input_ids": torch.ones(4, 16, dtype=torch.long), "attention_mask": torch.ones(4, 16, dtype=torch.long)}
    with FlopCounterMode(display=False) as mode:
        model(**batch).logits.sum().backward()
    # A first layer's inputs have no gradient, so a step counts a little less than three forward passes.
    assert 3 * Counter(model).forward(batch) == pytest.approx(mode.get_total_flops(), rel=0.1)


def test_what_is_no_checkpoint_is_one_sentence(tiny_task, tmp_path, capsys):
    assert train(tmp_path, tiny_task, tmp_path / "out") == 2
    assert "no checkpoint there" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert train(tmp_path, tiny_task, tmp_path / "out") == 2
    assert "transformers cannot open it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
