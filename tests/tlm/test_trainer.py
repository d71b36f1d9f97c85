"""Whole runs on the tiny task: same losses to the bit, killed and resumed, on two processes, and what is refused."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from tlm import trainer
from tlm.cli import main

RUN = [
    "model.hidden=32", "model.layers=2", "model.heads=2", "model.intermediate=48", "model.max_length=32",
    "tokenizer.vocabulary=400", "retrieval.k=20", "joint.steps=40", "joint.batch=8", "joint.eval_every=20",
    "finetune.steps=20", "finetune.batch=8", "finetune.eval_every=10", "threads=1", "checkpoint_seconds=0",
    "joint.external_per_task=3", "finetune.head=fresh",
]  # fmt: skip

MIXED = ["joint.mixup=1", "finetune.mixup=1"]


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


# Losses of a run of the task alone, its embeddings begun at random, by the keys that were the defaults when they were
# written down: a change of the code that is meant to change
# nothing leaves them. They are the same to the bit on one machine only (the test above); with another processor's
# instructions (SSE instead of AVX2) they differed by up to 3e-7 of themselves.
GOLDEN = {
    ("joint", 10, "dev"): 0.08238382704642112,
    ("joint", 10, "train"): 2.8562432527542114,
    ("joint", 20, "dev"): 0.037867322859064544,
    ("joint", 20, "train"): 2.4957661628723145,
    ("finetune", 10, "dev"): 0.22431964008606803,
    ("finetune", 10, "train"): 0.810247340798378,
    ("finetune", 20, "dev"): 0.10103761762864236,
    ("finetune", 20, "train"): 0.14669488593935967,
}


@pytest.fixture
def golden(tiny_task, cache, tmp_path):
    names = [f"task={tiny_task}", f"out={tmp_path}", f"cache={cache}", "run=golden"]
    keys = ["init=random", "joint.steps=20", "joint.eval_every=10", "joint.mlm_weight=1", "joint.mask_rate=0.15"]
    keys += ["finetune.mask_rate=0", "finetune.matrix_lr=3e-3"]
    keys += [f"{stage}.{key}" for stage in ("joint", "finetune") for key in ("embedding_share=1", "balance=0")]

    def run(*more):
        assert main(["train", *names, *RUN, *keys, *more]) == 0
        return {(r["stage"], r["step"], r["kind"]): r["loss"] for r in losses(tmp_path / "golden")}

    return run


def test_golden_losses(golden):
    assert golden() == pytest.approx(GOLDEN, rel=1e-5)


def test_what_stage_two_starts_from_is_scored_once(golden):
    found = golden("finetune.head=keep", "finetune.steps=10")
    scored = [(stage, step) for stage, step, kind in found if kind == "dev"]
    assert scored == [("joint", 10), ("finetune", 0), ("finetune", 10)]
    assert found["finetune", 0, "dev"] == pytest.approx(GOLDEN["joint", 20, "dev"], rel=1e-5)


def test_without_stage_two_the_joint_stages_end_is_scored(golden):
    found = golden("finetune.head=keep", "finetune.steps=0")
    assert [(stage, step) for stage, step, kind in found if kind == "dev"] == [("joint", 10), ("joint", 20)]


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
from tlm import checkpoints, engine, trainer
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
elif where == "commit":  # the files are written, the manifest is not there yet
    checkpoints.Checkpoints.commit = killing(checkpoints.Checkpoints.commit, before=True)
elif where == "prune":  # the checkpoint is renamed and named the latest; the old ones are still there
    checkpoints.prune = killing(checkpoints.prune, before=True)
elif where == "term":  # a polite request, in the middle of a step
    set_rates, calls = engine.set_rates, []
    def asked(*arguments):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        set_rates(*arguments)
    engine.set_rates = asked
elif where == "best":
    trainer.save_model = killing(trainer.save_model, before=False)
elif where == "line":  # half a line of metrics.jsonl is written
    from tlm.run import Run
    record, calls = Run.record, []
    def torn(run, **values):
        calls.append(1)
        if len(calls) == count:
            with open(run.metrics_path, "a") as file:
                file.write('{"stage": "jo')
            os.kill(os.getpid(), signal.SIGKILL)
        record(run, **values)
    Run.record = torn
elif where == "summary":  # it is written, and has not got its name yet
    replace = os.replace
    def nameless(source, target):
        if str(target).endswith("summary.json"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    os.replace = nameless
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("step", 1),
        ("step", 17),
        ("step", 41),
        ("step", 55),
        ("commit", 3),
        ("prune", 2),
        ("best", 1),
        ("line", 5),
        ("summary", 1),
    ],
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


@pytest.mark.parametrize("step", [17, 48])
def test_sigterm_finishes_the_step_and_says_how_to_go_on(step, arguments, finished, tmp_path):
    """No checkpoint was due: the one that SIGTERM causes falls between two lines of metrics."""
    arguments = [*arguments, "run=asked", "checkpoint_seconds=1000"]
    command = [sys.executable, "-c", KILLED, "term", str(step), *arguments]
    asked = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert asked.returncode == 128 + signal.SIGTERM, asked.stderr
    assert "run=asked checkpoint_seconds=1000` goes on" in asked.stderr.splitlines()[-1]
    assert (tmp_path / "asked" / "ckpt" / "latest").read_text().strip().endswith(f"{(step - 1) % 40 + 1:06d}")
    assert main(arguments) == 0
    assert losses(tmp_path / "asked") == losses(finished)
    assert same_weights(tmp_path / "asked", finished)
    assert scores(tmp_path / "asked") == scores(finished)


def spikes(run):
    return [record for record in losses(run) if record["kind"] == "spike"]


def poisoned(monkeypatch, is_bad, spoil):
    """`spoil` in place of each step whose batches satisfy `is_bad(draw)`."""
    gradients = trainer.Loop.gradients

    def wrapped(loop, micros):
        draw, _ = loop.batches(loop.stage.step + loop.stage.skipped)
        return spoil(loop, micros, gradients) if is_bad(loop, draw) else gradients(loop, micros)

    monkeypatch.setattr(trainer.Loop, "gradients", wrapped)


def as_nan(loop, micros, gradients):
    _, _, amounts = gradients(loop, micros)
    for p in loop.model.parameters():
        if p.grad is not None:
            p.grad.fill_(torch.nan)
    return torch.nan, torch.nan, amounts


@pytest.mark.parametrize("policy", ["rewind", "skip"])
def test_a_poisoned_batch_costs_a_batch(policy, arguments, tmp_path, monkeypatch):
    poisoned(monkeypatch, lambda loop, draw: draw[0].source == "external" and 80 in draw[0].positions, as_nan)
    assert main([*arguments, "run=poisoned", f"spike={policy}"]) == 0
    (spike,) = spikes(tmp_path / "poisoned")
    assert spike["action"] == policy
    assert spike["loss"] is None
    assert spike["step"] == 14  # the external batches of 8 texts are steps 1, 2, 3, 5, 6, 7, ...: the eleventh
    assert len(spike["batches"][0]["examples"]) == 8
    assert all(torch.isfinite(weight).all() for weight in weights(tmp_path / "poisoned").values())
    steps = [r["step"] for r in losses(tmp_path / "poisoned") if r["kind"] == "train" and r["stage"] == "joint"]
    assert steps == [10, 20, 30, 40]


def test_a_weight_that_is_no_number_is_rewound(arguments, finished, tmp_path, monkeypatch):
    """The weight breaks after a sound step: a checkpoint from before is whole, and one step is done again."""
    broken = []

    def breaks(loop, draw):
        return loop.stage.name == "joint" and loop.stage.step == 25 and not broken

    def spoil(loop, micros, gradients):
        broken.append(True)
        with torch.no_grad():
            loop.model.model.layers[0].attn.Wo.weight[0, 0] = torch.nan
        return gradients(loop, micros)

    poisoned(monkeypatch, breaks, spoil)
    assert main([*arguments, "run=broken"]) == 0
    (spike,) = spikes(tmp_path / "broken")
    assert (spike["action"], spike["step"]) == ("rewind", 26)
    assert all(torch.isfinite(weight).all() for weight in weights(tmp_path / "broken").values())


def test_after_a_rewind_losses_of_later_steps_are_no_measure(arguments, tmp_path, monkeypatch):
    """Each step leaves one loss: after going back to the first step none is remembered."""
    remembered = []

    def breaks(loop, draw):
        if loop.stage.name == "joint":
            remembered.append((loop.stage.step, sum(map(len, loop.stage.spikes.losses.values()))))
        return len(remembered) == 26

    poisoned(monkeypatch, breaks, as_nan)
    assert main([*arguments, "run=forgetful", "checkpoint_seconds=1000"]) == 0
    assert remembered[25:27] == [(25, 25), (0, 0)]
    assert all(step == number for step, number in remembered)


def test_an_exploding_rate_stops_the_run_after_three_rewinds(arguments, tmp_path, monkeypatch, capsys):
    set_rates = trainer.engines.set_rates

    def explode(engine, stage, share):
        set_rates(engine, stage, share * (1e4 if explode.calls > 25 else 1))
        explode.calls += 1

    explode.calls = 0
    monkeypatch.setattr(trainer.engines, "set_rates", explode)
    assert main([*arguments, "run=exploding", "checkpoint_seconds=1000"]) == 2
    assert "lower joint.lr" in capsys.readouterr().err.splitlines()[-1]
    assert [spike["action"] for spike in spikes(tmp_path / "exploding")] == ["rewind"] * 3 + ["stop"]
    assert not (tmp_path / "exploding" / "summary.json").exists()


def test_a_healthy_run_has_no_spikes(finished):
    assert not spikes(finished)


def test_a_checkpoint_from_a_stranger_runs_no_code(arguments, tmp_path, capsys):
    arguments = [*arguments, "run=stranger"]
    stopped_midway(arguments)
    checkpoints = tmp_path / "stranger" / "ckpt"
    folder = checkpoints / (checkpoints / "latest").read_text().strip()
    (states,) = folder.glob("*.pt")
    torch.save({"module": Evil(str(tmp_path / "harm"))}, states)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][states.name] = hashlib.sha256(states.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert main(arguments) == 2
    assert "more than tensors" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "harm").exists()


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


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
    others = sorted(p.parent.name for p in checkpoints.glob("*/manifest.json") if p.parent.name != newest)
    assert others[-1] in message
    (checkpoints / "latest").write_text(others[-1])  # the mend that the message names
    assert main(arguments) == 0


def test_a_full_disk_while_a_checkpoint_is_written_keeps_the_last_one(arguments, finished, tmp_path):
    """A file size limit stands for the full disk: the write fails in the middle of a file."""
    arguments = [*arguments, "run=full"]
    stopped_midway(arguments)
    latest = (tmp_path / "full" / "ckpt" / "latest").read_text()
    code = (
        "import resource, signal, sys; from tlm.cli import main; from tlm.checkpoints import Checkpoints\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); save = Checkpoints.save\n"
        "def full(*a):\n    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); save(*a)\n"
        "Checkpoints.save = full; sys.exit(main(sys.argv[1:]))"
    )
    failed = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment())
    assert failed.returncode == 2, failed.stderr
    assert "cannot be written" in failed.stderr.splitlines()[-1]
    assert "Traceback" not in failed.stderr
    assert (tmp_path / "full" / "ckpt" / "latest").read_text() == latest
    assert not list((tmp_path / "full" / "ckpt").glob("*.half"))
    assert main(arguments) == 0
    assert same_weights(tmp_path / "full", finished)


def launched(processes, script, *arguments, options=(), **more):
    """`script` (a file, or -m and a module) by torchrun, with `arguments`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, *options, *script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**more), timeout=180)


def assert_same_losses(run, other):
    for a, b in zip(losses(run), losses(other), strict=True):
        assert (a["stage"], a["step"], a.get("tokens")) == (b["stage"], b["step"], b.get("tokens"))
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a.get("grad_norm") == pytest.approx(b.get("grad_norm"), abs=1e-4)


def stopped_in_step(count, arguments):
    """Run in this process until SIGTERM in the middle of its step `count`, which is finished; returns the status."""
    set_rates, calls = trainer.engines.set_rates, []

    def asked(*given):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        set_rates(*given)

    with mock.patch.object(trainer.engines, "set_rates", asked):
        return main(arguments)


ZERO = [("muon", 1), ("adamw", 2), ("adamw", 3)]


@pytest.fixture(scope="module")
def by_two(tiny_task, tiny_corpus, cache, tmp_path_factory):
    """Two processes' runs: `whole` is theirs from start to end, those of `ZERO` one process began and is to end.

    One start of two processes makes all, since starting takes most of the time.
    """
    out = tmp_path_factory.mktemp("by_two")
    names = ["train", f"task={tiny_task}", f"corpus={tiny_corpus}", f"out={out}", f"cache={cache}", *RUN]
    for optimizer, stage in ZERO:
        run = f"run={optimizer}{stage}"
        assert stopped_in_step(27, [*names, run, *zero(optimizer, stage)]) == 128 + signal.SIGTERM
    script = out / "two.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_trainer import *\n"
        "assert main([*sys.argv[1:], 'run=whole']) == 0\n"
        "assert main([*sys.argv[1:], 'run=mixed', *MIXED]) == 0\n"
        "for optimizer, stage in ZERO:\n"
        "    run = f'run={optimizer}{stage}'\n"
        "    assert stopped_in_step(24, [*sys.argv[1:], run, *zero(optimizer, stage)]) == 143\n"
    )
    done = launched(2, [str(script)], *names, PATH=without_compiler())
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def zero(optimizer, stage, device="none"):
    keys = f"stage={stage}", f"offload_optimizer.device={device}"
    return [f"optimizer={optimizer}", *(f"deepspeed.zero_optimization.{key}" for key in keys)]


def test_two_processes_see_the_same_data_and_the_same_losses(by_two, finished):
    assert_same_losses(by_two / "whole", finished)


def test_mixed_pairs_are_those_of_two_processes_and_of_a_run_that_goes_on(by_two, finished, arguments, tmp_path):
    assert stopped_in_step(30, [*arguments, "run=mixed", *MIXED]) == 128 + signal.SIGTERM
    assert main([*arguments, "run=mixed", *MIXED]) == 0
    assert_same_losses(by_two / "mixed", tmp_path / "mixed")
    assert losses(tmp_path / "mixed")[-1]["loss"] != pytest.approx(losses(finished)[-1]["loss"], abs=1e-3)


@pytest.mark.parametrize(("optimizer", "stage"), ZERO)
def test_zero_goes_from_one_process_to_two_and_back(optimizer, stage, by_two, plain, finished, arguments):
    """The optimizer's pieces are cut anew: written by one and read by two, written by two and read by one."""
    run = by_two / f"{optimizer}{stage}"
    newest = run / "ckpt" / (run / "ckpt" / "latest").read_text().strip()
    assert (newest.name, len(list(newest.glob("*optim_states.pt")))) == ("finetune-000011", 2)
    assert main([*arguments, f"out={by_two}", f"run={run.name}", *zero(optimizer, stage)]) == 0
    assert_same_losses(run, {"muon": finished, "adamw": plain}[optimizer])


def test_a_run_begun_by_one_process_goes_on_with_four(arguments, finished, tmp_path):
    assert stopped_in_step(30, [*arguments, "run=four"]) == 128 + signal.SIGTERM
    done = launched(4, ["-m", "tlm"], *arguments, "run=four")
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_losses(tmp_path / "four", finished)


def test_a_supervisor_starts_a_run_again_when_a_process_was_killed(arguments, by_two, tmp_path):
    """Rank 1 is killed in step 17. Rank 0 says so in one sentence; torchrun starts both again, to the same end."""
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, sys\nif (os.environ['RANK'], os.environ['TORCHELASTIC_RESTART_COUNT']) == ('1', '0'):\n"
        f"    exec({KILLED!r})\nfrom tlm.cli import main\nsys.exit(main(sys.argv[3:]))\n"
    )
    done = launched(2, [str(script)], "step", "17", *arguments, "run=killed", options=["--max-restarts=1"])
    assert done.returncode == 0, done.stderr[-2000:]
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("tlm: ")]
    assert "process 0: another process has ended or cannot be reached" in sentence
    assert "Traceback" not in done.stderr
    assert "going on from checkpoint joint-0000" in done.stderr
    assert losses(tmp_path / "killed") == losses(by_two / "whole")
    assert same_weights(tmp_path / "killed", by_two / "whole")


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


@pytest.fixture(scope="module")
def plain(tiny_task, tiny_corpus, cache, tmp_path_factory):
    """A run with AdamW, without ZeRO."""
    out = tmp_path_factory.mktemp("plain")
    names = [f"task={tiny_task}", f"corpus={tiny_corpus}", f"out={out}", f"cache={cache}", "run=plain"]
    assert main(["train", *names, *RUN, "optimizer=adamw"]) == 0
    return out / "plain"


@pytest.mark.parametrize(
    ("optimizer", "stage", "device"),
    [("adamw", 1, "none"), ("adamw", 2, "cpu"), ("adamw", 3, "cpu"), ("muon", 2, "cpu")],
)
def test_zero_gives_the_losses_and_norms_of_plain_training(
    optimizer, stage, device, plain, finished, arguments, tmp_path
):
    assert main([*arguments, "run=zero", *zero(optimizer, stage, device)]) == 0
    assert_same_losses(tmp_path / "zero", {"muon": finished, "adamw": plain}[optimizer])


def test_deepspeeds_adamw_gives_the_losses_of_ours_and_compiles_nothing(plain, arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))
    theirs = ["deepspeed.optimizer.type=AdamW", "deepspeed.optimizer.params.betas=[0.9,0.98]"]
    assert main([*arguments, "run=theirs", "optimizer=adamw", *theirs]) == 0
    assert_same_losses(tmp_path / "theirs", plain)
    assert not (tmp_path / "compiled").exists()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["deepspeed.zero_optimization.stage=3"], "Muon"),
        (["optimizer=adamw", "deepspeed.zero_optimization.stage=7"], "DeepSpeed refuses"),
        (["optimizer=adamw", "deepspeed.zero_optimization.stage=3", "finetune.average=ema"], "finetune.average=none"),
        (["deepspeed.optimizer.type=OneBitAdam"], "OneBitAdam"),
        (["deepspeed.gradient_cliping=3"], "did you mean deepspeed.gradient_clipping?"),
        (["deepspeed.qqq=3"], "deepspeed.qqq: DeepSpeed knows no such key; remove it"),
        (["deepspeed.zero_optimization.zero_quantized_gradients=true"], "on a GPU only"),
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


def test_several_runs_answer_by_the_mean_of_their_probabilities(finished, tiny_task, tmp_path, capsys):
    other, third, test = tmp_path / "other", tmp_path / "third", str(tiny_task / "test.jsonl")
    for folder in (other, third):
        shutil.copytree(finished, folder)
    weights = load_file(other / "model/model.safetensors")
    weights["classifier.bias"][0] += 1
    save_file(weights, other / "model/model.safetensors")

    def predicted(runs):
        assert main(["predict", runs, test]) == 0
        return [list(json.loads(x)["probabilities"].values()) for x in capsys.readouterr().out.splitlines()]

    one, two, both = (torch.tensor(predicted(runs)) for runs in (f"{finished}", f"{other}", f"{finished},{other}"))
    assert (one - two).abs().max() > 0.01
    assert torch.allclose(both, (one + two) / 2, atol=2e-6)
    assert main(["eval", f"{finished},{other}", "split=test"]) == 0
    shown = json.loads(capsys.readouterr().out)
    gold = [json.loads(line)["label"] for line in (tiny_task / "test.jsonl").read_text().splitlines()]
    named = sorted(set(gold))
    right = sum(named[i] == label for i, label in zip(both.argmax(1).tolist(), gold, strict=True))
    assert shown["accuracy"] == pytest.approx(right / len(gold))
    summary = json.loads((third / "summary.json").read_text())
    (third / "summary.json").write_text(json.dumps(summary | {"labels": ["p", "q", *summary["labels"][2:]]}))
    for runs, words in (
        (f"{finished},{finished}", "twice"),
        (f"{finished},{third}", "of one task"),
        ("a,", "such run"),
    ):
        assert main(["predict", runs, test]) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_dry_run_writes_nothing(arguments, tmp_path, capsys):
    assert main([*arguments, "run=dry", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("hidden: 32", "parameters:", "flops:", "estimated_minutes:", "60 texts"))
    assert not list(tmp_path.iterdir())
