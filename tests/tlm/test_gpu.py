"""Whole runs and predictions on a GPU beside the same on the CPU: `TRITON_INTERPRET=0 pytest tests/tlm/test_gpu.py`."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import PRETRAIN
from safetensors.torch import load_file
from test_devices import SHAPE, some_batch

from tlm import attention
from tlm.batches import pack
from tlm.model import Transformer
from tlm.objectives import Losses

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or TRITON_INTERPRET=0 is not set")

RUN = [
    "model.hidden=128", "model.layers=2", "model.heads=2", "model.intermediate=192", "model.max_length=32",
    "tokenizer.vocabulary=400", "retrieval.k=20", "joint.steps=40", "joint.batch=8", "joint.eval_every=20",
    "finetune.steps=20", "finetune.batch=8", "finetune.eval_every=10", "threads=1", "boards=[]", "spike=log",
    "joint.external_per_task=3",
]  # fmt: skip


def begun(*words):
    """Each in a process of its own, as DeepSpeed keeps to the device that it saw first."""
    clean = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    return subprocess.Popen([sys.executable, "-m", "tlm", *map(str, words)], env=clean, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def done(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    return out


@pytest.fixture(scope="module")
def words(tiny_task, tiny_corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    return ["train", f"task={tiny_task}", f"corpus={tiny_corpus}", f"out={folder}", f"cache={folder}/cache", *RUN]


@pytest.fixture(scope="module")
def runs(words):
    """name -> folder of a run of the same task; made side by side."""
    asked = {
        "cpu": ["device=cpu"],
        "fp32": ["device=cuda", "checkpoint_seconds=0"],
        "bf16": ["device=cuda", "precision=bf16"],
        "auto": ["device=cuda", "micro_batch=auto"],
        "checkpointing": ["device=cuda", "activation_checkpointing=true"],
        "compiled": ["device=cuda", "compile=true"],
        "cpu-adamw": ["device=cpu", "optimizer=adamw"],
        "adamw": ["device=cuda", "optimizer=adamw"],
        "zero": ["device=cuda", "optimizer=adamw", "deepspeed.zero_optimization.stage=2"],
    } | {name: ["device=cuda", f"precision={name}"] for name in ("fp8-tensorwise", "fp8-rowwise", "fp8-blockwise")}
    done(begun(*words, "device=cpu", "run=cpu"))  # fills the cache
    running = {name: begun(*words, *more, f"run={name}") for name, more in asked.items() if name != "cpu"}
    for process in running.values():
        done(process)
    out = next(word for word in words if word.startswith("out=")).removeprefix("out=")
    return {name: f"{out}/{name}" for name in asked}


def losses(folder):
    with open(f"{folder}/metrics.jsonl") as file:
        return np.array([record["loss"] for record in map(json.loads, file) if record["kind"] == "train"])


def summary(folder):
    with open(f"{folder}/summary.json") as file:
        return json.load(file)


@pytest.mark.parametrize(("name", "twin", "within"), [
    ("fp32", "cpu", 2e-3), ("auto", "fp32", 2e-3), ("checkpointing", "fp32", 2e-3), ("compiled", "fp32", 2e-3),
    ("adamw", "cpu-adamw", 2e-3), ("zero", "adamw", 2e-3), ("bf16", "cpu", 0.05),
    ("fp8-tensorwise", "cpu", 0.1), ("fp8-rowwise", "cpu", 0.1), ("fp8-blockwise", "cpu", 0.1),
])  # fmt: skip
def test_losses_are_those_of_its_twin(runs, name, twin, within):
    found, right = losses(runs[name]), losses(runs[twin])
    assert len(found) == len(right) > 3
    assert np.abs(found[:3] - right[:3]).max() < within
    if name != "checkpointing":  # which computes twice
        assert summary(runs[name])["cost"]["flops"] == pytest.approx(summary(runs[twin])["cost"]["flops"], rel=1e-6)


def test_killed_and_begun_again_it_ends_with_the_same_losses(words, runs):
    process = begun(*words, "device=cuda", "checkpoint_seconds=0", "run=killed", "joint.steps=400")
    folder = runs["cpu"].removesuffix("cpu") + "killed"
    for _ in range(1200):
        if os.path.exists(f"{folder}/metrics.jsonl") and len(losses(folder)) >= 4:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    again, whole = (
        begun(*words, "device=cuda", "checkpoint_seconds=0", f"run={name}", "joint.steps=400")
        for name in ("killed", "uninterrupted")
    )
    done(again), done(whole)
    right = losses(folder.removesuffix("killed") + "uninterrupted")
    np.testing.assert_allclose(losses(folder)[-3:], right[-3:], rtol=0.05, atol=0.02)


def test_predictions_are_those_of_the_cpu(runs, tiny_task):
    rows = {}
    for run in ("fp32", "fp8-blockwise"):
        both = [begun("predict", runs[run], tiny_task / "dev.jsonl", f"device={at}") for at in ("cpu", "cuda")]
        rows[run] = [[list(json.loads(line)["probabilities"].values()) for line in done(p).splitlines()] for p in both]
    np.testing.assert_allclose(*rows["fp32"], atol=1e-4)
    np.testing.assert_allclose(*rows["fp8-blockwise"], atol=0.05)


def test_prompted_tasks_train_and_are_scored(pool_folder, tmp_path):
    common = [f"pool={pool_folder}", f"cache={tmp_path}/cache"]
    for attends in ("prefix", "causal"):
        for device in ("cpu", "cuda"):
            done(begun("pretrain", *common, f"out={tmp_path}", *PRETRAIN, f"attention={attends}", f"device={device}",
                       "pool.soft=2", f"run={attends}-{device}"))  # fmt: skip
        found, right = (losses(tmp_path / f"{attends}-{device}") for device in ("cuda", "cpu"))
        np.testing.assert_allclose(found, right, rtol=0.02)
        run, scores = tmp_path / f"{attends}-cpu", []
        for device in ("cpu", "cuda"):
            done(begun("eval", run, *common, "categories=[riddles]", f"device={device}"))
            scores.append(json.loads((run / "zeroshot.json").read_text())["all"])
            (run / "zeroshot.json").unlink()
        assert scores[0]["sum"]["normalised"] == pytest.approx(scores[1]["sum"]["normalised"], abs=0.05)


@pytest.mark.parametrize("lengths", [(9, 4, 7, 7, 12), (1, 1), (300,), (64,) * 40])
def test_flash_attention_is_torchs_own(lengths):
    rng = np.random.default_rng(0)
    batch = pack([rng.integers(5, 300, n) for n in lengths]).to("cuda")
    qkv = torch.randn(sum(lengths), 3, 4, 32, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    cos, sin = attention.angles(torch.arange(sum(lengths), device="cuda"), 32, 10000.0, torch.float32)
    right = attention.attend_by_torch(qkv.double(), batch, cos.double(), sin.double())
    half = qkv.bfloat16().requires_grad_()
    assert attention.flash_takes(half)
    found = attention.attend(half, batch, cos.bfloat16(), sin.bfloat16())
    assert (found.double() - right).norm() < 0.02 * right.norm()
    found.sum().backward()
    assert half.grad.isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_those_of_the_cpu(autocast):
    def gradients(device):
        module = Losses(Transformer(SHAPE, torch.Generator().manual_seed(0), residual_init="scaled")).to(device).eval()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast and device == "cuda"):
            sum(module(some_batch().to(device), True, True)).backward()
        return {name: p.grad.cpu().double() for name, p in module.named_parameters()}

    right, found = gradients("cpu"), gradients("cuda")
    for name in right:
        assert (found[name] - right[name]).norm() <= (0.05 if autocast else 1e-4) * right[name].norm() + 1e-9, name


def test_weights_of_a_gpu_run_open_on_a_cpu(runs):
    weights = load_file(f"{runs['bf16']}/model/model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert all(w.isfinite().all() for w in weights.values())
