"""Selection on Ray, with real workers on this machine."""

import json
import os
import re
import signal
import time
from contextlib import suppress

import numpy as np
import psutil
import pytest
from test_engines import ENGLISH

from retrieval.cluster import Cluster, merge
from retrieval.engines import ENGINES, Hits
from retrieval.engines.scan import Stream
from retrieval.select import Selection
from tasks.errors import InputError
from tlm.cli import main

SCORED = (ENGLISH, "lucene", 1.2, 0.75)


@pytest.fixture(scope="module")
def workers():
    """Two of them."""
    ray = pytest.importorskip("ray", reason="ray is not installed; pip install -c constraints.txt -e '.[ray]'")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()


@pytest.fixture
def files(real_text, tmp_path):
    """Eight files, one of them with a blank text alone."""
    for number in range(8):
        texts = [" "] if number == 3 else [f"{text} n{i % 50}" for i in range(60) for text in real_text[number::40]]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (tmp_path / f"{number}.jsonl").write_text("".join(lines))
    return Stream(str(tmp_path / "*.jsonl"))


def test_a_worker_that_is_killed_in_the_middle_changes_nothing(workers, files, real_text, tmp_path):
    queries = [*(ENGLISH.terms(text) for text in real_text[::30]), [], ["qwzx"]]
    expected = ENGINES["scan"](files, *SCORED, tmp_path / "one", 1).search(queries, 40)
    killed = []

    def kill_one(done: int, total: int, what: str) -> None:
        assert total == 8
        until = time.monotonic() + (0.5 if what not in killed else 0)
        while time.monotonic() < until:
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if re.match("ray::(count|score)_file", process.name()):
                        os.kill(process.pid, signal.SIGKILL)
                        killed.append(what)
                        return

    found = Cluster("auto", files, *SCORED, tmp_path / "many", progress=kill_one).search(queries, 40)
    assert killed == ["files counted", "files scored"]  # one of the two workers each, while it was at a file
    assert np.array_equal(found.rows, expected.rows)
    assert np.array_equal(found.scores, expected.scores)
    assert not list((tmp_path / "many").glob("*unfinished*"))


def test_a_file_that_vanishes_is_named_and_a_rerun_goes_on(workers, files, real_text, tmp_path):
    queries = [ENGLISH.terms(text) for text in real_text[::100]]
    engine = Cluster("auto", files, *SCORED, tmp_path / "kept")
    expected = engine.search(queries, 9)
    seen = []

    def lose(done: int, total: int, what: str) -> None:
        seen.append((what, done))
        if what == "files scored" and (tmp_path / "7.jsonl").exists():
            (tmp_path / "7.jsonl").rename(tmp_path / "away")

    for file in (tmp_path / "kept").iterdir():
        file.unlink()
    with pytest.raises(InputError, match=r"^[^\n]*7\.jsonl: no such file[^\n]*$"):
        Cluster("auto", files, *SCORED, tmp_path / "kept", progress=lose).search(queries, 9)
    (tmp_path / "away").rename(tmp_path / "7.jsonl")
    scored = max(done for what, done in seen if what == "files scored")
    seen.clear()
    again = Cluster("auto", files, *SCORED, tmp_path / "kept", progress=lambda *s: seen.append(s)).search(queries, 9)
    assert [done for done, _, _ in seen] == list(range(scored + 1, 9))
    assert np.array_equal(again.rows, expected.rows)
    assert np.array_equal(again.scores, expected.scores)


def test_a_selection_by_the_command_line_is_scans(workers, files, tiny_task, tmp_path):
    arguments = [f"task={tiny_task}", f"corpus={files.spec}", "retrieval.engine=scan", "retrieval.k=9", "threads=1"]
    chosen = {}
    for name, more in {"one": [], "many": ["retrieval.cluster=auto"]}.items():
        out = tmp_path / name
        assert main(["retrieve", *arguments, f"out={out}", f"cache={tmp_path / f'{name}-cache'}", *more]) == 0
        chosen[name] = (out / "selection.jsonl.gz").read_bytes(), Selection(out)
    assert chosen["one"][0] == chosen["many"][0]
    assert np.array_equal(chosen["one"][1].rows, chosen["many"][1].rows)
    assert len({row // 1200 for row in chosen["one"][1].rows.tolist()}) > 3  # from several files


def test_merge_keeps_the_best_by_score_and_then_row():
    one = Hits(np.array([[4, 0, -1]]), np.array([[3.0, 1.0, 0.0]]))
    other = Hits(np.array([[2, 7]]), np.array([[3.0, 0.5]]))
    assert [column.tolist() for column in merge(one, other)] == [[[2, 4, 0]], [[3.0, 3.0, 1.0]]]


def test_without_ray_one_sentence_says_how_to_get_it(files, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match=r"needs the package ray: pip install .* '\.\[ray\]'"):
        Cluster("auto", files, *SCORED, tmp_path)
