"""`tlm bench retrieval` measures each part once, and goes on after a part that is there."""

import json

import pytest

from tlm.benches import retrieval, rounds
from tlm.cli import main


def test_parts_are_measured_and_kept(tiny_task, tiny_corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(retrieval, "ROUNDS", 1)
    monkeypatch.setattr(retrieval, "SCAN_QUERIES", (20,))
    out = tmp_path / "bench.json"
    common = [
        f"task={tiny_task}", f"corpus={tiny_corpus}", f"cache={tmp_path / 'cache'}", f"out={out}", "queries=30",
        "engines=[bm25,rank_bm25]",
    ]  # fmt: skip
    assert main(["bench", "retrieval", *common, "cases=[scan]"]) == 0
    first = json.loads(out.read_text())["rows"]
    assert [(row["case"], row["engine"], row["unit"]) for row in first] == [("scan, 20 queries", "scan", "MB/s")]
    assert main(["bench", "retrieval", *common, "cases=[scan,index]"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert rows[: len(first)] == first
    indexed = {(row["engine"], row["metric"]): row["value"] for row in rows[len(first) :]}
    assert set(indexed) >= {("bm25", "documents"), ("bm25", "on disk"), ("rank_bm25", "documents")}
    assert all(value > 0 for (engine, _), value in indexed.items() if engine == "bm25")
    assert "scan: is in" in capsys.readouterr().err


def test_growth_is_plotted(tmp_path):
    rows = [
        rounds.row("retrieval", f"growth, {d:,} documents, {q:,} queries", "bm25", "queries", d / q, "queries/s", 5)
        for d, q in ((100, 20), (2000, 20), (2000, 5))
    ]
    retrieval.plot(rows, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("setting", "message"),
    [("engines=[bm25x]", "engines=bm25x: no such engine"), ("cases=[speed]", "cases=speed: no such case"),
     ("corpus=", "corpus=: missing")],
)  # fmt: skip
def test_bad_settings(setting, message, tiny_task, tiny_corpus, tmp_path, capsys):
    arguments = [f"task={tiny_task}", f"corpus={tiny_corpus}", f"cache={tmp_path}", setting]
    assert main(["bench", "retrieval", *arguments]) == 2
    assert message in capsys.readouterr().err
