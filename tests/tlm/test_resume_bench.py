"""`tlm bench resume` on programs that stand for tlm, of which it has to tell the sound one from the others."""

import json
import subprocess
import sys

import pytest

from tasks.errors import InputError
from tlm.benches import resume
from tlm.config import BenchConfig

# Counts to 20 in a file, one number every 20 ms, and goes on from what it finds there.
PROGRAM = """
import json, pathlib, sys, time
run, fault = pathlib.Path(sys.argv[1]), sys.argv[2]
metrics, model = run / "metrics.jsonl", run / "model" / "model.safetensors"
model.parent.mkdir(parents=True, exist_ok=True)
begun = len(metrics.read_text().splitlines()) if metrics.exists() else 0
if begun and fault == "refuses":
    sys.exit("a warning\\ntlm: the disk is full")
for step in range(begun, 20):
    loss = step + (begun if fault == "drifts" else 0)
    with open(metrics, "a") as file:
        file.write(json.dumps({"step": step, "loss": loss, "seconds": time.time()}) + "\\n")
    time.sleep(0.02)
model.write_bytes(b"weights")
cost = {"flops": 1, "tokens": 1}
(run / "summary.json").write_text(json.dumps({"dev": {}, "test": {}, "cost": cost}))
"""


def bench(fault, monkeypatch, tmp_path):
    def start(config, out, name):
        with open(out / f"{name}.err", "w") as errors:
            return subprocess.Popen([sys.executable, "-S", "-c", PROGRAM, str(out / name), fault], stderr=errors)

    monkeypatch.setattr(resume, "start", start)
    status = resume.bench(BenchConfig(task="any", kills=3, out=str(tmp_path / "figures.json")))
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    return status, {row["metric"]: row["value"] for row in rows}


def test_a_run_that_goes_on_exactly_passes(monkeypatch, tmp_path):
    status, figures = bench("none", monkeypatch, tmp_path)
    assert status == 0
    assert figures["kills"] == 3
    assert figures["the same to the bit"] == figures["runs finished"] >= 1


def test_a_run_that_ends_otherwise_after_a_kill_is_found(monkeypatch, tmp_path):
    status, figures = bench("drifts", monkeypatch, tmp_path)
    assert status == 1
    assert figures["the same to the bit"] < figures["runs finished"]


def test_a_run_that_does_not_go_on_is_named(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="killed-0: does not go on after .*: the disk is full$"):
        bench("refuses", monkeypatch, tmp_path)
