"""The doctor: what it finds here is compared with what other means say; what is missing is made missing."""

import importlib.metadata
import itertools
import json
import os
import re

import pytest
import torch

from tlm import doctor
from tlm.doctor import Check


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_versions_are_those_of_the_installed_packages(tmp_path):
    checks = by_name(doctor.versions(tmp_path))
    assert checks["torch"].value == torch.__version__.split("+")[0] or checks["torch"].value == torch.__version__
    assert checks["omegaconf"] == Check("versions", "omegaconf", "ok", importlib.metadata.version("omegaconf"))


def test_missing_packages_come_with_the_command(tmp_path, monkeypatch):
    """A needed one is broken, one of an extra and the demo's data are absent."""
    real = importlib.metadata.version

    def version(name):
        if name in ("omegaconf", "datasets", "evals"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.0.1" if name == "rank-bm25" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    checks = by_name(doctor.versions(tmp_path))
    assert (checks["omegaconf"].state, checks["omegaconf"].mend) == ("broken", "pip install -c constraints.txt -e .")
    assert (checks["datasets"].state, checks["datasets"].mend[-7:]) == ("absent", '.[hub]"')
    assert checks["demo's data"].state == "absent"
    assert checks["demo's data"].mend.endswith("pip install --no-deps -c constraints.txt evals")
    assert checks["rank-bm25"].state == "broken"
    assert checks["rank-bm25"].value.startswith("0.0.1, wanted >=")


def test_matmul_speed_is_operations_by_time(monkeypatch):
    """By a clock that goes on a millisecond with each look: a product takes 1 ms and has 2 x 1024^3 operations."""
    ticks = itertools.count()
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: next(ticks) / 1000)
    assert doctor.matmul_gflops(torch.get_num_threads(), seconds=0.01) == pytest.approx(2147.483648)


def test_matmul_speed_restores_the_threads():
    before = torch.get_num_threads()
    doctor.matmul_gflops(before + 1, seconds=0.01)
    assert torch.get_num_threads() == before


def test_engines_are_tried(tmp_path, monkeypatch):
    monkeypatch.setenv("TLM_OPENSEARCH", "http://127.0.0.1:1")
    checks = by_name(doctor.retrieval_engines(tmp_path))
    assert [checks[name].state for name in ("bm25", "scan", "rank_bm25")] == ["ok"] * 3
    assert checks["opensearch"].state == "absent"  # no server listens there
    assert "set TLM_OPENSEARCH" in checks["opensearch"].value

    from retrieval import engines

    def missing(*arguments):
        raise ImportError("No module named 'lucene'")

    class Wrong:
        def search(self, queries, k):
            import numpy as np

            return engines.Hits(np.array([[2]]), np.array([[1.0]]))

    monkeypatch.setattr(engines, "ENGINES", {"lucene": missing, "wrong": lambda *arguments: Wrong()})
    checks = by_name(doctor.retrieval_engines(tmp_path))
    assert (checks["lucene"].state, checks["lucene"].value) == ("absent", "No module named 'lucene'")
    assert checks["wrong"].state == "broken"


def test_the_training_engine_is_started(tmp_path, monkeypatch):
    (check,) = doctor.training_engine(tmp_path)
    assert (check.name, check.state, check.value[:17]) == ("deepspeed", "ok", "starts, 1 process")

    def broken():
        raise RuntimeError("no such backend\nat line 3")

    monkeypatch.setattr("tlm.engine.launch", broken)
    (check,) = doctor.training_engine(tmp_path)
    assert (check.state, check.value) == ("broken", "no such backend")


def test_precisions_are_tried_on_the_cpu(tmp_path):
    checks = by_name(doctor.precisions(tmp_path))
    assert checks["cpu fp32"].state == "ok"
    assert all(re.match(r"works at [\d.e-]+ x", checks[f"cpu {p}"].value) for p in ("bf16", "fp16"))
    assert (checks["cuda"].state == "ok") == torch.cuda.is_available()


def test_disk(tmp_path, monkeypatch):
    assert doctor.disk(tmp_path / "not" / "there" / "yet").state == "ok"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: Usage(5 << 20))
    check = doctor.disk(tmp_path)
    assert (check.state, check.mend) == ("broken", "make room: at least 2 GiB")
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    assert "cannot be written" in doctor.disk(tmp_path).value


class Usage:
    def __init__(self, free: int):
        self.free = free


def test_no_compiler_is_no_obstacle(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert (doctor.compiler().state, "g++" in doctor.compiler().mend) == ("absent", True)


@pytest.mark.parametrize("state", ["absent", "broken"])
def test_exit_status_and_json(tmp_path, monkeypatch, capsys, state):
    found = [Check("a section", "a thing", "ok", "1.0"), Check("a section", "another", state, "gone", "pip install it")]
    monkeypatch.setattr(doctor, "SECTIONS", {"a section": lambda runs: found})
    status = 1 if state == "broken" else 0

    assert doctor.doctor(tmp_path, as_json=True) == status
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] == (status == 0)
    assert said["checks"][1] == {
        "section": "a section", "name": "another", "state": state, "value": "gone", "mend": "pip install it",
    }  # fmt: skip

    assert doctor.doctor(tmp_path) == status
    table = capsys.readouterr().out
    assert f"{state}: gone" in table
    assert "pip install it" in table
    assert ("needed and broken: another" in table) == (state == "broken")
