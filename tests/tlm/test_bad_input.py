"""What a user can get wrong, end to end: one clear sentence, exit status 2, and nothing written."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch

from tasks.errors import InputError
from tlm import engine, trainer
from tlm.cli import main
from tlm.config import TrainConfig
from tlm.engine import World
from tlm.objectives import Mixup, Objective, Source
from tlm.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

WORDS = {"our": "sport", "the": "sport", "rich": "trade", "poor": "trade"}


def good(split):
    return [{"text": f"{word} {split} team wins again {i}", "label": WORDS[word]} for i in range(6) for word in WORDS]


GOOD = good("train")


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def task(folder, **splits):
    folder.mkdir()
    for split in ("train", "dev", "test"):
        (folder / f"{split}.jsonl").write_bytes(splits.get(split, lines(good(split))))
    return folder


ZERO = "deepspeed.zero_optimization.stage={}"
QUICK = [
    "model.hidden=16", "model.layers=1", "model.heads=2", "model.intermediate=16", "tokenizer.vocabulary=120",
    "joint.steps=2", "joint.batch=4", "finetune.steps=2", "finetune.batch=4", "finetune.eval_every=1", "threads=1",
    "boards=[]",
]  # fmt: skip

CASES = {
    "a missing file": (None, [], ["nowhere.csv", "no such"]),
    "an empty file": (dict(train=b""), [], ["train.jsonl", "empty"]),
    "one label only": (dict(train=lines(GOOD[:2] * 3)), [], ["label"]),
    "a label in dev that train lacks": (
        dict(dev=lines([*good("dev"), {"text": "new", "label": "stage"}])),
        [],
        ["stage", "dev"],
    ),
    "a broken JSON line": (dict(train=lines(GOOD[:5]) + b'{"text": "x", "label"\n'), [], ["train.jsonl", "6"]),
    "a wrong column": ({}, ["data.text_column=body"], ["body", "text"]),
    "undecodable bytes": (
        dict(train=lines(GOOD[:3]) + b'{"text": "\xff\xfe", "label": "sport"}\n'),
        [],
        ["train.jsonl", "4"],
    ),
    "an unknown key": ({}, ["joint.stpes=3"], ["joint.stpes", "joint.steps"]),
    "a value of the wrong type": ({}, ["joint.steps=many"], ["joint.steps=many"]),
    "a missing corpus": ({}, ["corpus=nowhere"], ["nowhere"]),
    "heads that do not divide": ({}, ["model.heads=3"], ["model.hidden=128", "model.heads=3"]),
    "a head of odd size": ({}, ["model.hidden=20", "model.heads=4"], ["model.hidden=20", "model.heads=4"]),
    "ZeRO 3 with Muon": ({}, [ZERO.format(3), *QUICK], ["stage=3", "Muon", "optimizer=adamw"]),
    "ZeRO of no stage": ({}, [ZERO.format(7), "optimizer=adamw", *QUICK], ["deepspeed", "refuses"]),
    "ZeRO without its keys": (
        {},
        ["deepspeed.zero_optimization=2", "optimizer=adamw", *QUICK],
        ["deepspeed", "refuses"],
    ),
    "averages under ZeRO 3": (
        {},
        [ZERO.format(3), "optimizer=adamw", "finetune.average=ema", *QUICK],
        ["stage=3", "set finetune.average=none"],
    ),
    "a batch that is no whole number": ({}, ["joint.batch=2.5"], ["joint.batch=2.5"]),
    "an empty batch": ({}, ["joint.batch=0"], ["joint.batch=0", "at least 1"]),
    "a rate that is no number": ({}, ["joint.lr=.nan"], ["joint.lr=nan", "at least 0"]),
    "gradients clipped to less than nothing": ({}, ["finetune.clip=-1"], ["finetune.clip=-1", "at least 0"]),
    "more threads than a machine starts": ({}, ["threads=100000"], ["threads=100000", "at most 1024"]),
    "a seed below zero": ({}, ["seed=-1"], ["seed=-1", "at least 0"]),
    "a micro-batch of no tokens": ({}, ["micro_batch=some"], ["micro_batch=some", "none, auto or a number"]),
    "a device that is not there": ({}, ["device=cuda"], ["device=cuda", "set device=cpu"]),
    "a folder of runs that is a file": ({}, ["out=task/train.jsonl", *QUICK], ["task/train.jsonl: is a file", "out="]),
    "a cache that is a file": ({}, ["cache=task/train.jsonl", *QUICK], ["task/train.jsonl/", "cannot be written"]),
    "a device that nobody knows": ({}, ["device=tpu"], ["device=tpu", "cpu"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    splits, settings, words = CASES[case]
    source = "nowhere.csv" if splits is None else task(tmp_path / "task", **splits)
    assert main(["train", f"task={source}", "run=x", f"cache={tmp_path / 'cache'}", *settings]) == 2
    captured = capsys.readouterr()
    message = captured.err.splitlines()[-1]
    assert message.startswith("tlm: ")
    assert "Traceback" not in captured.err
    for word in words:
        assert word in message, message
    assert not (tmp_path / "runs").exists()


def test_a_corpus_that_no_query_matches(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(lines([{"text": "весна " + "лето " * i} for i in range(1, 20)]))
    folder = task(tmp_path / "task")
    assert main(["train", f"task={folder}", f"corpus={corpus}", "run=x", f"cache={tmp_path / 'cache'}"]) == 2
    assert "no document of the corpus shares a term" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


def test_more_processes_than_texts(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine, "launch", lambda device, timeout_minutes: World(0, 25))
    assert main(["train", f"task={task(tmp_path / 'task')}", "run=x", f"cache={tmp_path / 'cache'}"]) == 2
    assert "24 training texts for 25 processes" in capsys.readouterr().err.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"task"}


@pytest.mark.parametrize(("ramp", "mixup", "least"), [(0.0, None, 3), (0.5, None, 12), (0.0, Mixup(1.0, 0), 6)])
def test_a_batch_smaller_than_the_number_of_processes(ramp, mixup, least):
    """5 texts for 3 processes are dealt out as 2, 2 and 1; 2 are too few. Pairs are not divided."""
    texts = Source(None, np.full(50, 10))
    config = TrainConfig()
    config.joint.batch_ramp = ramp

    def mixture(batch):
        config.joint.batch = batch
        return trainer.mixture(
            "joint", config.joint, Objective({"task": texts}, 0.0, None, mixup=mixup), 0, 0, World(0, 3)
        )

    assert mixture(least).smallest == (6 if mixup else 3)
    with pytest.raises(InputError, match=f"joint.batch: .* set joint.batch={least} or more"):
        mixture(4 if mixup else 2)


def test_a_date_is_a_good_seed(tmp_path):
    given = [f"task={task(tmp_path / 'task')}", f"out={tmp_path}", f"cache={tmp_path / 'cache'}", "run=x"]
    assert main(["train", *given, *QUICK, "init=random", "finetune.dropout=0.1", "seed=20251125"]) == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run in `runs/x` and the cache beside it."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(arguments(folder)) == 0
    return folder


def arguments(folder):
    source = folder / "task" if (folder / "task").exists() else task(folder / "task")
    return ["train", f"task={source}", "run=x", f"out={folder / 'runs'}", f"cache={folder / 'cache'}", *QUICK]


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path, dirs_exist_ok=True)


@pytest.mark.parametrize("verb", ["eval", "predict", "export"])
@pytest.mark.parametrize(("vocabulary", "words"), [(150, "150 tokens, the model"), (None, "sha256")])
def test_a_tokenizer_that_is_not_the_models(verb, vocabulary, words, copied, capsys):
    """Of another size, and of the same with two words changed about."""
    path = copied / "runs/x/model/tokenizer.json"
    if vocabulary:
        save_tokenizer(train_tokenizer([f"word{i} and {i} others" for i in range(200)], vocabulary), path)
    else:
        description = json.loads(path.read_text())
        words_of = description["model"]["vocab"]
        a, b = list(words_of)[-2:]
        words_of[a], words_of[b] = words_of[b], words_of[a]
        path.write_text(json.dumps(description))
        assert load_tokenizer(path).token_to_id(a) == words_of[a]
    given = {"predict": [str(copied / "task/test.jsonl")], "export": [f"out={copied / 'out'}"]}.get(verb, [])
    capsys.readouterr()
    assert main([verb, str(copied / "runs/x"), *given]) == 2
    captured = capsys.readouterr()
    assert str(path) in captured.err.splitlines()[-1]
    assert words in captured.err.splitlines()[-1]
    assert not captured.out
    assert not (copied / "out").exists()


@pytest.mark.parametrize("verb", ["eval", "predict"])
def test_a_finished_run_computes_on_the_device_asked_for(verb, finished, capsys, monkeypatch):
    """The device `meta` refuses to compute with tensors of another, and to give numbers back, which comes last."""
    given = [verb, str(finished / "runs/x"), *([str(finished / "task/test.jsonl")] if verb == "predict" else [])]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*given, "device=cuda"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("tlm: device=cuda: ")
    assert "set device=cpu" in message
    monkeypatch.setattr(engine, "device_of", lambda name: torch.device("meta"))
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        main(given)


def unfinished(folder):
    """The run as a kill after its last step leaves it; returns what its files hold."""
    (folder / "runs/x/summary.json").unlink()
    return {path: path.read_bytes() for path in sorted((folder / "runs").rglob("*")) if path.is_file()}


def test_a_resume_with_changed_data_names_the_hash(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "moved")
    (finished / "task/train.jsonl").rename(finished / "task/kept")
    try:
        (finished / "task/train.jsonl").write_bytes(lines(good("other")))
        new = hashlib.sha256((finished / "task/train.jsonl").read_bytes()).hexdigest()
        old = hashlib.sha256((finished / "task/kept").read_bytes()).hexdigest()
        before = unfinished(folder)
        assert main([*arguments(finished), f"out={folder / 'runs'}"]) == 2
    finally:
        (finished / "task/kept").replace(finished / "task/train.jsonl")
    message = capsys.readouterr().err.splitlines()[-1]
    for word in ("train.jsonl: has changed since", old[:12], new[:12]):
        assert word in message
    assert {path: path.read_bytes() for path in before} == before


def test_a_resume_with_another_vocabulary(finished, tmp_path, capsys):
    """The cached tokenizer of a run was made anew from something else."""
    folder = shutil.copytree(finished, tmp_path / "moved")
    for cached in (folder / "cache").glob("tokenizer-*.json"):
        save_tokenizer(train_tokenizer([f"word{i} and {i} others" for i in range(200)], 150), cached)
    before = unfinished(folder)
    assert main([*arguments(finished), f"out={folder / 'runs'}", f"cache={folder / 'cache'}"]) == 2
    assert "tokenizer.json: has changed since" in capsys.readouterr().err.splitlines()[-1]
    assert {path: path.read_bytes() for path in before} == before
