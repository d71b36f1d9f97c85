"""Two hosts as network namespaces of this machine, and the cable between them pulled out in the middle of a run.

Slow, and needs root: `TLM_SLOW=1 python -m pytest tests/tlm/test_hosts.py`.
"""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

LIMIT_SECONDS = 15  # of silence
ADDRESSES = {"tlm-left": "10.77.0.1", "tlm-right": "10.77.0.2"}
RUN = [
    "model.hidden=32", "model.layers=2", "model.heads=2", "model.intermediate=48", "model.max_length=32",
    "tokenizer.vocabulary=400", "retrieval.k=20", "joint.steps=60", "joint.batch=8", "joint.eval_every=20",
    "finetune.steps=20", "finetune.batch=8", "finetune.eval_every=10", "threads=1", "checkpoint_seconds=0",
    f"timeout_minutes={LIMIT_SECONDS / 60}",
]  # fmt: skip


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True)


@pytest.fixture
def hosts():
    """Names of two namespaces whose only way to each other is one pair of interfaces, each named as its host."""
    if not os.environ.get("TLM_SLOW"):
        pytest.skip("slow (about a minute): set TLM_SLOW=1 to run it")
    if not shutil.which("ip"):
        pytest.skip("`ip` is missing: install iproute2")
    left, right = ADDRESSES
    try:
        for host in ADDRESSES:
            ip("netns", "add", host)
        ip("link", "add", left, "type", "veth", "peer", "name", right)
        for host, address in ADDRESSES.items():
            ip("link", "set", host, "netns", host)
            ip("-n", host, "address", "add", f"{address}/24", "dev", host)
            ip("-n", host, "link", "set", "lo", "up")
            ip("-n", host, "link", "set", host, "up")
    except subprocess.CalledProcessError as error:
        remove(ADDRESSES)
        pytest.skip(f"network namespaces need root and are refused here: {error.stderr.strip()}")
    yield [left, right]
    remove(ADDRESSES)


def remove(names):
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def train_on(hosts, arguments):
    """The same command on each host, but for its rank."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    meeting = [f"--master-addr={ADDRESSES[hosts[0]]}", "--master-port=29577"]
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", host, *launcher, *meeting, f"--node-rank={rank}", "-m", "tlm", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": host},
        )
        for rank, host in enumerate(hosts)
    ]


def losses(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["stage"], line["step"], line["kind"], line["loss"]) for line in lines]


def test_a_cut_between_two_hosts_is_told_on_both_and_costs_the_steps_since_the_checkpoint(
    hosts, tiny_task, tiny_corpus, tmp_path
):
    arguments = ["train", f"task={tiny_task}", f"corpus={tiny_corpus}", f"out={tmp_path}", f"cache={tmp_path}/c", *RUN]
    undisturbed = train_on(hosts, [*arguments, "run=whole"])
    assert [process.wait(180) for process in undisturbed] == [0, 0]

    arguments.append("run=cut")
    cut, metrics = train_on(hosts, arguments), tmp_path / "cut" / "metrics.jsonl"
    while not metrics.exists():
        assert all(process.poll() is None for process in cut)
        time.sleep(0.05)
    ip("-n", hosts[0], "link", "set", hosts[0], "down")
    start = time.monotonic()
    said = [process.communicate(timeout=180)[1] for process in cut]
    assert time.monotonic() - start < LIMIT_SECONDS + 30
    for rank, (process, text) in enumerate(zip(cut, said, strict=True)):
        assert process.returncode != 0
        (sentence,) = [line for line in text.splitlines() if line.startswith("tlm: ")]
        assert f"process {rank}: another process has ended or cannot be reached (Timed out" in sentence
    assert not (tmp_path / "cut" / "summary.json").exists()
    step = int((tmp_path / "cut" / "ckpt" / "latest").read_text().strip().removeprefix("joint-"))
    assert 0 < step < 60

    ip("-n", hosts[0], "link", "set", hosts[0], "up")
    again = train_on(hosts, arguments)
    said = [process.communicate(timeout=180)[1] for process in again]
    assert [process.returncode for process in again] == [0, 0], said
    assert f"going on from checkpoint joint-{step:06d}" in said[0]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    weights = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("cut", "whole")]
    assert weights[0] == weights[1]
