"""micro_batch=: the same losses in smaller parts, what is chosen where memory is short, and what a resume keeps to."""

import json

import numpy as np
import pytest
import torch

from tasks.errors import InputError
from tlm import memory, trainer
from tlm.cli import main
from tlm.config import TrainConfig, load, validate
from tlm.engine import ALONE
from tlm.memory import cgroup_rooms, tokens_at_once
from tlm.model import ModelShape, Transformer, load_model
from tlm.objectives import Losses, parts

RUN = [
    "model.hidden=32", "model.layers=2", "model.heads=2", "model.intermediate=48", "model.max_length=32",
    "tokenizer.vocabulary=400", "joint.steps=12", "joint.batch=16", "joint.eval_every=0", "finetune.steps=8",
    "finetune.batch=16", "finetune.eval_every=4", "threads=1", "boards=[]",
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def arguments(tiny_task, cache, tmp_path):
    return ["train", f"task={tiny_task}", f"out={tmp_path}", f"cache={cache}", *RUN]


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_parts_hold_each_example_once_within_the_limit():
    lengths = np.random.default_rng(0).integers(1, 60, 41).tolist()
    for world in (1, 2, 3):
        shares = [parts(lengths, rank, world, 100) for rank in range(world)]
        assert sorted(i for share in shares for part in share for i in part) == list(range(41))
        assert len({len(share) for share in shares}) == 1  # the processes meet after each part
        assert max(sum(lengths[i] for i in part) for share in shares for part in share) <= 100
        assert [parts(lengths, 0, world, None)[0].tolist()] == [list(range(0, 41, world))]
        assert len(parts(lengths, 0, world, 10_000)) == 1


def test_parts_keep_pairs_together():
    lengths = np.random.default_rng(0).integers(1, 30, 41).tolist()
    for world in (1, 2, 3):
        found = [part.tolist() for rank in range(world) for part in parts(lengths, rank, world, 80, together=2)]
        assert sorted(i for part in found for i in part) == list(range(41))
        assert all(part.index(i + 1) == part.index(i) + 1 for part in found for i in part if i % 2 == 0 and i < 40)
        assert max(sum(lengths[i] for i in part) for part in found) <= 80


def test_a_text_that_is_too_long_is_a_part_of_its_own():
    assert [part.tolist() for part in parts([50, 3, 50], 0, 1, 10)] == [[0], [1], [2]]
    assert [len(parts([50, 50, 50], rank, 2, 10)) for rank in (0, 1)] == [1, 1]


def test_auto_halves_until_it_fits():
    tried = []
    assert tokens_at_once("auto", lambda n: tried.append(n) or n < 300, 2048, 128, ALONE) == 256
    assert tried == [2048, 1024, 512, 256]
    assert tokens_at_once("auto", lambda n: n < 200, 1000, 190, ALONE) == 190
    with pytest.raises(InputError, match="micro_batch=auto: not even 128 tokens fit"):
        tokens_at_once("auto", lambda n: False, 2048, 128, ALONE)
    assert tokens_at_once("none", lambda n: False, 2048, 128, ALONE) is None
    assert tokens_at_once("300", lambda n: False, 2048, 128, ALONE) == 300


def test_little_memory_gives_more_parts_and_the_same_losses(arguments, tmp_path, monkeypatch):
    """A micro-batch has 16 texts of 20 tokens, and memory is left for 300 with masks; a resume sees more memory."""
    batches = []
    monkeypatch.setattr(Losses, "forward", noting(batches))
    assert main([*arguments, "run=whole"]) == 0
    assert batches == [320] * (12 + 8)
    assert not (tmp_path / "whole" / "micro_batch.json").exists()

    model = load_model(tmp_path / "whole" / "model")
    parameters = sum(p.numel() for p in model.parameters())
    state = memory.optimizer_bytes("muon", parameters, 2 * (4 * 32**2 + 3 * 32 * 48))

    def room(tokens):
        step = memory.activation_bytes(model.shape, tokens, 20, round(0.15 * tokens))
        return memory.MARGIN * (8 * parameters + 2 * state + step)

    monkeypatch.setattr(memory, "available_bytes", lambda: room(300))
    batches.clear()
    monkeypatch.setattr(trainer.Loop, "log", stopping(trainer.Loop.log))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(validate(load(TrainConfig, [*arguments[1:], "run=parts", "micro_batch=auto"])))
    monkeypatch.setattr(memory, "available_bytes", lambda: room(100_000))
    assert main([*arguments, "run=parts", "micro_batch=auto"]) == 0
    assert batches == [160] * 2 * (10 + 12) + [320] * 8  # ten steps before the kill; without masks all fits
    assert json.loads((tmp_path / "parts" / "micro_batch.json").read_text()) == {"joint": 160, "finetune": 320}
    whole, cut = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert cut == pytest.approx(whole, abs=1e-5)


def noting(batches):
    forward = Losses.forward

    def wrapped(self, batch, mlm, task):
        batches.append(sum(batch.lengths))
        return forward(self, batch, mlm, task)

    return wrapped


def stopping(log):
    """A kill at the first line of the log."""
    done = []

    def wrapped(*arguments):
        if not done:
            done.append(1)
            raise KeyboardInterrupt
        return log(*arguments)

    return wrapped


def test_on_a_gpu_it_is_tried(monkeypatch):
    module = Losses(Transformer(ModelShape(100, 32, 1, 2, 48, 32, 3), torch.Generator().manual_seed(0)))
    sizes = []
    monkeypatch.setattr(Losses, "forward", noting(sizes))
    attempt = [module, 256, 32, 0.15, 1000, "fp32", torch.device("cpu")]
    assert memory.runs(*attempt)
    assert sizes == [256]
    assert all(p.grad is None for p in module.parameters())

    def full(self, batch, mlm, task):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Losses, "forward", full)
    assert not memory.runs(*attempt)


@pytest.mark.parametrize("version", [1, 2])
def test_the_room_below_a_control_groups_limit(version, tmp_path):
    """The group's own limit, its parent's, and none at the top; cached files count as free."""
    line, folder = {1: ("4:memory:/a/b", "sys/fs/cgroup/memory"), 2: ("0::/a/b", "sys/fs/cgroup")}[version]
    limit, used, cached = (memory.V1, memory.V2)[version - 1]
    for name, most in (("a", 5000), ("a/b", 3000), ("", None)):
        group = tmp_path / folder / name
        group.mkdir(parents=True, exist_ok=True)
        (group / limit).write_text(f"{most or 'max'}\n")
        (group / used).write_text("1000\n")
        (group / "memory.stat").write_text(f"cache 7\n{cached} 200\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"9:cpu:/\n{line}\n")
    assert sorted(cgroup_rooms(tmp_path)) == [2200, 4200]
    assert cgroup_rooms(tmp_path / "nowhere") == []
