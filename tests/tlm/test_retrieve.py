import gzip
import json

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
