import gzip
import json
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pytest
import zstandard
from conftest import write_jsonl
from pyarrow import parquet

from retrieval import corpus as corpora
from retrieval.corpus import open_corpus
from retrieval.engines import scan
from retrieval.select import Selection
from retrieval.selectors import bm25
from tlm.cli import main


def test_retrieve_writes_a_selection_that_opens_again(tiny_task, tiny_corpus, tmp_path, capsys):
    arguments = [f"task={tiny_task}", f"corpus={tiny_corpus}", f"out={tmp_path / 'out'}", f"cache={tmp_path / 'cache'}"]
    assert main(["retrieve", *arguments, "retrieval.k=5"]) == 0
    with gzip.open(tmp_path / "out" / "selection.jsonl.gz", "rt") as file:
        records = [json.loads(line) for line in file]
    assert set(records[0]) == {"id", "text", "source", "rank", "score", "query"}
    assert [r["rank"] for r in records] == sorted(r["rank"] for r in records)
    assert list(Selection(tmp_path / "out").texts()) == [r["text"] for r in records]
    shown = capsys.readouterr().out
    assert f"{len(records)} documents" in shown
    assert "60 queries found 5 to 5 documents each" in shown
    manifest = Selection(tmp_path / "out").manifest
    assert f"terms that pulled most: {', '.join(manifest['terms'])}" in shown
    assert f"reduction {manifest['kl']['reduction']:.3f}" in shown
    assert sum(manifest["scores"]["histogram"]["documents"]) == len(records)
    assert f"{manifest['samples'][0]['id']}, tiny" in " ".join(shown.split())


def test_several_tasks_share_a_selection(tiny_task, tiny_corpus, tmp_path, capsys):
    """Two tasks: the tiny one, and one on Python that lies in a single file."""
    words = {"a": ("method", "value", "name"), "b": ("class", "object", "type")}
    rows = [
        {"text": f"the {word} of a function in the module is called {i}", "label": label}
        for i in range(20)
        for label in words
        for word in words[label]
    ]
    other = write_jsonl(tmp_path / "other, with a comma.jsonl", rows)
    arguments = [f"corpus={tiny_corpus}", f"out={tmp_path / 'out'}", f"cache={tmp_path / 'cache'}"]
    assert main(["retrieve", f"task={other}", *arguments, "retrieval.k=5"]) == 0
    assert "task" not in next(Selection(tmp_path / "out").records())
    other = other.rename(tmp_path / "other.jsonl")
    keys = ["quota=3,1", "retrieval.max_documents=40", "retrieval.max_similarity=0.9"]
    assert main(["retrieve", f"task={tiny_task},{other}", *arguments, *keys]) == 0
    selection = Selection(tmp_path / "out")
    assert [part["documents"] for part in selection.manifest["tasks"]] == [30, 10]
    assert [record["task"] for record in selection.records()].count("other") == 10
    shown = capsys.readouterr().out
    assert "other: 10 documents" in shown
    assert "(quota 25%, 2,500 documents a query)" in shown
    assert "nearly the same as a better one were dropped" in shown


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["quota=1,1"], "each of the 1 tasks"),
        (["quota=many"], "each of the 1 tasks"),
        (["retrieval.max_similarity=0"], "max_similarity=0.0: must be above 0"),
        (["retrieval.selector=dsri"], "did you mean dsir?"),
        (["retrieval.selector=embedding", "retrieval.model=absent"], "retrieval.model=absent: holds no modules.json"),
    ],
)
def test_bad_keys_are_one_sentence(keys, words, tiny_task, tiny_corpus, tmp_path, capsys):
    arguments = [f"task={tiny_task}", f"corpus={tiny_corpus}", f"out={tmp_path / 'out'}", f"cache={tmp_path / 'cache'}"]
    assert main(["retrieve", *arguments, *keys]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("tlm: ")
    assert words in error
    assert not (tmp_path / "out").exists()


def test_retrieve_does_not_write_into_a_folder_of_something_else(tiny_task, tiny_corpus, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    arguments = [f"task={tiny_task}", f"corpus={tiny_corpus}", f"out={tmp_path}", f"cache={tmp_path / 'cache'}"]
    assert main(["retrieve", *arguments]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert main(["retrieve", *arguments[:2], f"out={tmp_path / 'notes.txt'}"]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_retrieve_does_not_write_over_a_store(tiny_task, tiny_corpus, tmp_path, capsys):
    store = open_corpus(str(tiny_corpus), tmp_path / "cache").folder
    before = (store / "manifest.json").read_bytes()
    arguments = [f"task={tiny_task}", f"corpus={tiny_corpus}", f"out={store}", f"cache={tmp_path / 'cache'}"]
    assert main(["retrieve", *arguments]) == 2
    assert "holds no selection" in capsys.readouterr().err
    assert (store / "manifest.json").read_bytes() == before


def test_a_selection_in_the_place_of_another_leaves_nothing_of_it(tiny_task, tiny_corpus, tmp_path):
    out = tmp_path / "out"
    arguments = [f"task={tiny_task}", f"corpus={tiny_corpus}", f"out={out}", f"cache={tmp_path / 'cache'}"]
    assert main(["retrieve", *arguments, "retrieval.k=5"]) == 0
    (out / "notes.txt").write_text("mine")
    assert (out / "hits.npy").exists()
    assert main(["retrieve", *arguments, "retrieval.k=5", "retrieval.selector=random"]) == 0
    chosen = Selection(out)
    assert {path.name for path in out.iterdir()} == {*chosen.manifest["files"], "manifest.json", "notes.txt"}
    assert not (out / "hits.npy").exists()


@pytest.fixture
def four_files(tiny_corpus, tmp_path) -> Path:
    """A folder of four kinds of files, with a blank text, and a text that repeats at the end."""
    corpus = open_corpus(str(tiny_corpus), tmp_path / "store")
    records = [{"id": d.id, "text": d.text, "source": f"s{row % 3}"} for row, d in enumerate(corpus)]
    records[70:70] = [{"id": "blank", "text": " - ", "source": "s0"}]
    lines = [json.dumps(record) + "\n" for record in records]
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(lines[:100]))
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.writelines(lines[100:200])
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress("".join(lines[200:300]).encode()))
    parquet.write_table(pyarrow.Table.from_pylist(records[300:]), folder / "d.parquet")
    return folder


def lines_of(folder: Path) -> list[str]:
    with gzip.open(folder / "selection.jsonl.gz", "rt") as file:
        return file.readlines()


@pytest.mark.parametrize("address", ["{}", "memory://four"])
def test_scan_selects_from_files_what_bm25_does_from_a_store(address, four_files, tiny_task, tmp_path, monkeypatch):
    monkeypatch.setattr(bm25, "HITS_A_SCAN", 200)  # several passes
    if address != "{}":
        for file in four_files.iterdir():
            with fsspec.open(f"{address}/{file.name}", "wb") as there:
                there.write(file.read_bytes())
    cache = tmp_path / "cache"
    arguments = [f"task={tiny_task}", f"corpus={address.format(four_files)}", f"cache={cache}", "retrieval.k=7"]
    arguments += ["retrieval.max_documents=120", "threads=2"]
    assert main(["retrieve", *arguments, "retrieval.engine=scan", f"out={tmp_path / 'scan'}"]) == 0
    assert not (cache / "corpora").exists()  # nothing was made of the files
    assert sorted(path.name for path in (cache / "indexes").iterdir() if "statistics" not in path.name) == []
    assert main(["retrieve", *arguments, f"out={tmp_path / 'bm25'}"]) == 0
    assert lines_of(tmp_path / "scan") == lines_of(tmp_path / "bm25")
    ours, theirs = Selection(tmp_path / "scan"), Selection(tmp_path / "bm25")
    assert np.array_equal(ours.rows, theirs.rows)
    for name in ("documents", "words", "by_source", "terms", "queries", "found"):
        assert ours.manifest[name] == theirs.manifest[name]
    assert ours.manifest["corpus"]["documents"] == theirs.manifest["corpus"]["documents"]


def test_scan_of_files_does_several_tasks_by_quota(four_files, tiny_task, tmp_path):
    """And drops near-duplicates: a fifth file has the texts of the first again, each with a word more."""
    again = [json.loads(line)["text"] + " qwzx" for line in (four_files / "a.jsonl").open()]
    write_jsonl(four_files / "e.jsonl", [{"text": text} for text in again])
    rows = [{"text": f"how the {word} {i} is called", "label": word} for i in range(12) for word in ("value", "name")]
    other = write_jsonl(tmp_path / "other.jsonl", rows)
    arguments = [f"task={tiny_task},{other}", "quota=3,1", f"corpus={four_files}", f"cache={tmp_path / 'cache'}"]
    arguments += ["retrieval.k=30", "retrieval.max_documents=120", "retrieval.max_similarity=0.8"]
    for engine in ("scan", "bm25"):
        assert main(["retrieve", *arguments, f"retrieval.engine={engine}", f"out={tmp_path / engine}"]) == 0
    assert lines_of(tmp_path / "scan") == lines_of(tmp_path / "bm25")
    ours, theirs = Selection(tmp_path / "scan"), Selection(tmp_path / "bm25")
    assert np.array_equal(ours.rows, theirs.rows)
    for name in ("near_duplicates", "terms", "queries", "scores", "samples", "found"):
        assert ours.manifest[name] == theirs.manifest[name]
    assert ours.manifest["near_duplicates"]["dropped"] > 5
    assert [part["documents"] for part in ours.manifest["tasks"]] == [90, 30]
    assert "kl" in theirs.manifest
    assert "kl" not in ours.manifest | ours.manifest["tasks"][0]


def test_scan_of_files_keeps_the_first_of_repeats_and_drops_leaks(tiny_task, tmp_path, capsys):
    test_text = json.loads((tiny_task / "test.jsonl").read_text().splitlines()[0])["text"]
    texts = ["match team", "market shares", "Match, team!", test_text, "film actor"]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = [f"task={tiny_task}", f"corpus={tmp_path / 'c.jsonl'}", f"cache={tmp_path / 'cache'}", "retrieval.k=99"]
    assert main(["retrieve", *arguments, "retrieval.engine=scan", f"out={tmp_path / 'out'}"]) == 0
    selection = Selection(tmp_path / "out")
    assert sorted(record["id"] for record in selection.records()) == ["c.jsonl:1", "c.jsonl:2", "c.jsonl:5"]
    assert selection.leaks.tolist() == [3]
    assert [example["row"] for example in selection.manifest["leaks"]["examples"]] == [3]
    assert "1 documents that overlap" in capsys.readouterr().out
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text, "id": "x"}) + "\n" for text in texts))
    assert main(["retrieve", *arguments, "retrieval.engine=scan", f"out={tmp_path / 'out'}"]) == 2
    assert "the id 'x' repeats: rows 0 and 1 have it" in capsys.readouterr().err


def test_a_file_that_vanishes_in_the_middle_and_comes_back(four_files, tiny_task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scan, "CHUNK_DOCUMENTS", 20)
    monkeypatch.setattr(scan, "CHUNKS_A_LEG", 2)
    arguments = [
        f"task={tiny_task}",
        f"corpus={four_files}",
        f"cache={tmp_path / 'cache'}",
        "retrieval.k=7",
        "threads=1",
    ]
    arguments.append("retrieval.engine=scan")
    assert main(["retrieve", *arguments, f"out={tmp_path / 'whole'}"]) == 0
    read, gone, opened, gone_at = corpora.read_documents, four_files / "d.parquet", [], 0

    def read_and_lose(paths, some=slice(None)):
        opened.append(paths[some])
        if len(opened) == gone_at and gone.exists():
            gone.rename(tmp_path / "d.parquet")
        yield from read(paths, some)

    for turn in (4, 8):  # in the first pass, in the second
        gone_at = turn
        monkeypatch.setattr(scan, "read_documents", read_and_lose)
        shutil.rmtree(tmp_path / "cache")
        opened.clear()
        capsys.readouterr()
        assert main(["retrieve", *arguments, f"out={tmp_path / 'out'}"]) == 2
        assert f"{gone}: no such file" in capsys.readouterr().err
        (tmp_path / "d.parquet").rename(gone)
        (unfinished,) = (tmp_path / "cache" / "indexes").glob("*unfinished*")
        opened.clear()
        monkeypatch.setattr(scan, "read_documents", read)
        assert main(["retrieve", *arguments, f"out={tmp_path / 'out'}"]) == 0
        assert not unfinished.exists()
        assert lines_of(tmp_path / "out") == lines_of(tmp_path / "whole")


def add(*arguments) -> int:
    return main(["corpus", "add", *map(str, arguments)])


def test_corpus_add_extends_the_store_and_its_index(tiny_task, real_text, tmp_path, capsys):
    store, cache = tmp_path / "store", f"cache={tmp_path / 'cache'}"
    for name, texts in (("a", real_text[:200]), ("b", real_text[200:230])):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(texts))
    arguments = [f"task={tiny_task}", f"corpus={store}", f"out={tmp_path / 'out'}", cache, "retrieval.k=5"]
    assert add(store, tmp_path / "a.txt", cache) == 0
    assert main(["retrieve", *arguments]) == 0
    shards = {path.name for path in (tmp_path / "cache" / "indexes").iterdir()}
    capsys.readouterr()
    assert add(store, tmp_path / "b.txt", cache) == 0
    assert "30 documents added, 230 now (0 blank ones and 0 repeats dropped)" in capsys.readouterr().out
    extended = {path.name for path in (tmp_path / "cache" / "indexes").iterdir()}
    assert shards < extended
    assert main(["retrieve", *arguments]) == 0
    assert {path.name for path in (tmp_path / "cache" / "indexes").iterdir()} == extended
    capsys.readouterr()
    assert add(store, tmp_path / "a.txt", cache) == 0
    assert "0 documents added, 230 now (0 blank ones and 200 repeats dropped)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("a.jsonl", '{"id": "1", "text": "other words"}', "the id '1' repeats"), ("b.jsonl", '{"text": "cut', "line 1"),
     ("c.jsonl", "", "the file is empty"), ("absent.jsonl", None, "no such file")],
)  # fmt: skip
def test_corpus_add_of_bad_files_leaves_the_store_as_it_was(name, content, message, tmp_path, capsys):
    store, cache = tmp_path / "store", f"cache={tmp_path / 'cache'}"
    (tmp_path / "first.jsonl").write_text('{"id": "1", "text": "some words"}')
    assert add(store, tmp_path / "first.jsonl", cache) == 0
    before = (store / "manifest.json").read_bytes()
    if content is not None:
        (tmp_path / name).write_text(content)
    capsys.readouterr()
    assert add(store, tmp_path / name, cache) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert (store / "manifest.json").read_bytes() == before
    assert add(tmp_path, tmp_path / "first.jsonl") == 2
    assert "is not a corpus store" in capsys.readouterr().err
    assert add(store) == 2
    assert "say which store and which files, as in `tlm corpus add STORE more.jsonl`" in capsys.readouterr().err
