import gzip
import json

import pytest
from conftest import write_jsonl

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
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
