"""Whole runs on the tiny task: same losses to the bit, killed and resumed, on two processes, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tlm.cli import main

RUN = [
    "model.hidden=32", "model.layers=2", "model.heads=2", "model.intermediate=48", "model.max_length=32",
    "tokenizer.vocabulary=400", "retrieval.k=20", "joint.steps=40", "joint.batch=8", "joint.eval_every=20",
    "finetune.steps=20", "finetune.batch=8", "finetune.eval_every=10", "threads=1", "checkpoint_seconds=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def arguments(tiny_task, tiny_corpus, cache, tmp_path):
    return ["train", f"task={tiny_task}", f"corpus={tiny_corpus}", f"out={tmp_path}", f"cache={cache}", *RUN]


@pytest.fixture(scope="module")
def finished(tiny_task, tiny_corpus, cache, tmp_path_factory):
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("runs")
    names = [f"task={tiny_task}", f"corpus={tiny_corpus}", f"out={out}", f"cache={cache}", "run=whole"]
    subprocess.run(
        [sys.executable, "-m", "tlm", "train", *names, *RUN], check=True, capture_output=True, env=environment()
    )
    return out / "whole"


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **more}


def losses(run):
    """Everything in metrics.jsonl but what the clock decides."""
    clocks = ("seconds", "tokens_per_second", "mfu")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in clocks} for record in records]


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def scores(run):
    summary = json.loads((run / "summary.json").read_text())
    return summary["dev"], summary["test"], summary["cost"]["flops"], summary["cost"]["tokens"]


def test_a_run_leaves_what_the_design_says(finished):
    summary = json.loads((finished / "summary.json").read_text())
    for name in ("config.yaml", "env.json", "inputs.json", "metrics.jsonl", "predictions.jsonl", "ckpt/latest"):
        assert (finished / name).exists(), name
    assert {"task", "metric", "dev", "test", "seed", "model", "data", "cost", "config_sha256"} <= summary.keys()
    assert summary["arm"] == "tlm"
    assert summary["data"]["external_documents"] > 0
    assert {"joint", "finetune", "retrieval_search", "tokenizing", "warm_start"} <= summary["cost"]["seconds"].keys()
    predictions = [json.loads(line) for line in (finished / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == 45
    right = sum(p["label"] == p["prediction"] for p in predictions) / 45
    assert summary["test"]["accuracy"] == pytest.approx(right)
    assert all(sum(p["probabilities"].values()) == pytest.approx(1, abs=1e-4) for p in predictions)


def test_the_paper_rule_counts_joint_tokens_and_all_parameters(finished):
    summary = json.loads((finished / "summary.json").read_text())
    joint = [r for r in losses(finished) if r["stage"] == "joint" and r["kind"] == "train"][-1]
    assert summary["cost"]["flops_paper"] == 6 * summary["model"]["parameters"] * joint["tokens"]


def test_the_test_split_is_read_after_the_last_step(finished):
    """Its scores are nowhere in what the loop wrote."""
    assert all("test" not in record for record in losses(finished))


def test_the_same_run_twice_is_the_same_to_the_bit(arguments, finished, tmp_path):
    assert main([*arguments, "run=again"]) == 0
    assert losses(tmp_path / "again") == losses(finished)
    assert same_weights(tmp_path / "again", finished)
    assert scores(tmp_path / "again") == scores(finished)


def test_a_finished_run_is_not_run_again(arguments, tmp_path, finished, capsys):
    shutil.copytree(finished, tmp_path / "whole")
    before = (tmp_path / "whole" / "summary.json").stat().st_mtime_ns
    assert main([*arguments, "run=whole"]) == 0
    assert "is finished" in capsys.readouterr().err
    assert (tmp_path / "whole" / "summary.json").stat().st_mtime_ns == before


def test_a_name_that_exists_with_another_configuration_is_refused(arguments, tmp_path, finished, capsys):
    shutil.copytree(finished, tmp_path / "whole")
    assert main([*arguments, "run=whole", "joint.lr=0.5"]) == 2
    assert "another configuration" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from tlm import engine, trainer
from tlm.cli import main
where, count = sys.argv[1], int(sys.argv[2])

def killing(function, before):
    calls = 0
    def wrapped(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == count and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **named)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped

if where == "step":
    engine.set_rates = killing(engine.set_rates, before=True)
elif where == "hash":  # DeepSpeed has written its files, the manifest is not there yet
    engine.file_sha256 = killing(engine.file_sha256, before=True)
elif where == "prune":  # the checkpoint is renamed and named the latest; the old ones are still there
    engine.prune = killing(engine.prune, before=True)
elif where == "best":
    trainer.save_model = killing(trainer.save_model, before=False)
main(sys.argv[3:])
"""


@pytest.mark.parametrize(
    ("where", "count"), [("step", 1), ("step", 17), ("step", 41), ("step", 55), ("hash", 3), ("prune", 2), ("best", 1)]
)
def test_a_killed_run_goes_on_to_the_same_end_to_the_bit(where, count, arguments, finished, tmp_path):
    arguments = [*arguments, "run=killed"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, where, str(count), *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "killed" / "summary.json").exists()
    assert main(arguments) == 0
    assert losses(tmp_path / "killed") == losses(finished)
    assert same_weights(tmp_path / "killed", finished)
    assert scores(tmp_path / "killed") == scores(finished)


def test_a_run_killed_from_outside_at_any_moment_goes_on(arguments, finished, tmp_path):
    arguments = [*arguments, "run=killed"]
    process = subprocess.Popen([sys.executable, "-m", "tlm", *arguments], stderr=subprocess.DEVNULL, env=environment())
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while process.poll() is None and not metrics.exists():
        time.sleep(0.01)
    time.sleep(0.05)
    process.kill()
    process.wait()
    assert main(arguments) == 0
    assert losses(tmp_path / "killed") == losses(finished)
    assert same_weights(tmp_path / "killed", finished)


def stopped_midway(arguments):
    subprocess.run([sys.executable, "-c", KILLED, "step", "35", *arguments], capture_output=True, env=environment())


def test_a_truncated_checkpoint_is_named_and_nothing_else_is_touched(arguments, tmp_path, capsys):
    arguments = [*arguments, "run=cut"]
    stopped_midway(arguments)
    checkpoints = tmp_path / "cut" / "ckpt"
    newest = (checkpoints / "latest").read_text().strip()
    (states,) = (checkpoints / newest).glob("*.pt")
    states.write_bytes(states.read_bytes()[:-100])
    assert main(arguments) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert newest in message
    assert "damaged" in message
    others = sorted(p.name for p in checkpoints.iterdir() if p.is_dir() and p.name not in (newest, "best"))
    assert others[-1] in message
    (checkpoints / "latest").write_text(others[-1])  # the mend that the message names
    assert main(arguments) == 0


def test_a_full_disk_while_a_checkpoint_is_written_keeps_the_last_one(arguments, finished, tmp_path):
    """A file size limit stands for the full disk: the write fails in the middle of DeepSpeed's file."""
    arguments = [*arguments, "run=full"]
    stopped_midway(arguments)
    latest = (tmp_path / "full" / "ckpt" / "latest").read_text()
    code = (
        "import resource, signal, sys; from tlm.cli import main; from tlm import engine\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); save = engine.save\n"
        "def full(*a):\n    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); save(*a)\n"
        "engine.save = full; sys.exit(main(sys.argv[1:]))"
    )
    failed = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment())
    assert failed.returncode == 2, failed.stderr
    assert "cannot be written" in failed.stderr.splitlines()[-1]
    assert "Traceback" not in failed.stderr
    assert (tmp_path / "full" / "ckpt" / "latest").read_text() == latest
    assert not list((tmp_path / "full" / "ckpt").glob("*.half"))
    assert main(arguments) == 0
    assert same_weights(tmp_path / "full", finished)


def test_two_processes_see_the_same_data_and_the_same_losses(arguments, finished, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tlm"]
    command = [*launcher, *arguments, "run=two"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(PATH=without_compiler()), timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = losses(finished), losses(tmp_path / "two")
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert (a["stage"], a["step"], a.get("tokens")) == (b["stage"], b["step"], b.get("tokens"))
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def without_compiler():
    """PATH without the folders that hold a C++ compiler."""
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(f for f in folders if not any(os.path.exists(os.path.join(f, c)) for c in ("c++", "g++")))


def test_accumulation_gives_what_one_large_batch_gives(tiny_task, cache, tmp_path):
    """Through DeepSpeed: 4 micro-batches of 8 texts and 1 of 32, in both stages."""
    alone = [
        "train",
        f"task={tiny_task}",
        f"out={tmp_path}",
        f"cache={cache}",
        *RUN,
        "joint.steps=12",
        "finetune.steps=12",
    ]
    small = ["joint.batch=8", "joint.accumulation=4", "finetune.batch=8", "finetune.accumulation=4"]
    assert main([*alone, "run=small", *small]) == 0
    assert main([*alone, "run=large", "joint.batch=32", "finetune.batch=32"]) == 0
    for a, b in zip(losses(tmp_path / "small"), losses(tmp_path / "large"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a.get("tokens") == b.get("tokens")


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_gives_the_losses_of_plain_training(stage, arguments, tmp_path):
    plain, zero = (
        [*arguments, "optimizer=adamw"],
        [*arguments, "optimizer=adamw", f"deepspeed.zero_optimization.stage={stage}"],
    )
    assert main([*plain, "run=plain"]) == 0
    assert main([*zero, "run=zero"]) == 0
    for a, b in zip(losses(tmp_path / "plain"), losses(tmp_path / "zero"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["deepspeed.zero_optimization.stage=1"], "Muon"),
        (["optimizer=adamw", "deepspeed.zero_optimization.stage=7"], "DeepSpeed refuses"),
        (["data.text_column=body"], "body"),
        (["corpus=absent-corpus"], "absent-corpus"),
    ],
)
def test_impossible_combinations_are_refused(extra, words, arguments, tmp_path, capsys):
    assert main([*arguments, "run=bad", *extra]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert words in last
    assert not (tmp_path / "bad").exists()


def test_predict_eval_and_export_use_the_run(finished, tiny_task, tmp_path, capsys, monkeypatch):
    import io

    rows = [json.loads(line) for line in (tiny_task / "test.jsonl").read_text().splitlines()]
    text = "\n".join(r["text"] for r in rows)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert main(["predict", str(finished), "-"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    stored = [json.loads(line) for line in (finished / "predictions.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [p["prediction"] for p in stored]
    assert main(["predict", str(finished), str(tiny_task / "test.jsonl")]) == 0
    assert [json.loads(line)["label"] for line in capsys.readouterr().out.splitlines()] == [
        p["prediction"] for p in stored
    ]

    assert main(["eval", str(finished), "split=test"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["macro_f1"] == pytest.approx(json.loads((finished / "summary.json").read_text())["test"]["macro_f1"])

    assert main(["export", str(finished), f"out={tmp_path / 'exported'}"]) == 0
    assert main(["export", str(finished), f"out={tmp_path / 'exported'}"]) == 2
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported")
    encoded = AutoTokenizer.from_pretrained(tmp_path / "exported")(text.split("\n"), padding=True, return_tensors="pt")
    with torch.no_grad():
        p = theirs(**{k: encoded[k] for k in ("input_ids", "attention_mask")}).logits.softmax(-1)
    for row, line in zip(p, lines, strict=True):
        assert row.tolist() == pytest.approx(list(line["probabilities"].values()), abs=1e-5)


def test_a_dry_run_writes_nothing(arguments, tmp_path, capsys):
    assert main([*arguments, "run=dry", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("hidden: 32", "parameters:", "flops:", "estimated_minutes:", "60 texts"))
    assert not list(tmp_path.iterdir())
