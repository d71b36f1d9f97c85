import gzip
import json

import pytest

from retrieval.select import Selection
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


def test_retrieve_does_not_write_into_a_folder_of_something_else(tiny_task, tiny_corpus, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    arguments = [f"task={tiny_task}", f"corpus={tiny_corpus}", f"out={tmp_path}", f"cache={tmp_path / 'cache'}"]
    assert main(["retrieve", *arguments]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


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
