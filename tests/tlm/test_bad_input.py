"""What a user can get wrong, end to end: one clear sentence, exit status 2, and nothing written."""

import json

import pytest

from tlm.cli import main

WORDS = {"our": "sport", "the": "sport", "rich": "trade", "poor": "trade"}


def good(split):
    return [{"text": f"{word} {split} team wins again {i}", "label": WORDS[word]} for i in range(6) for word in WORDS]


GOOD = good("train")


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def task(folder, **splits):
    folder.mkdir()
    for split in ("train", "dev", "test"):
        (folder / f"{split}.jsonl").write_bytes(splits.get(split, lines(good(split))))
    return folder


CASES = {
    "a missing file": (None, [], ["nowhere.csv", "no such"]),
    "an empty file": (dict(train=b""), [], ["train.jsonl", "empty"]),
    "one label only": (dict(train=lines(GOOD[:2] * 3)), [], ["label"]),
    "a label in dev that train lacks": (
        dict(dev=lines([*good("dev"), {"text": "new", "label": "stage"}])),
        [],
        ["stage", "dev"],
    ),
    "a broken JSON line": (dict(train=lines(GOOD[:5]) + b'{"text": "x", "label"\n'), [], ["train.jsonl", "6"]),
    "a wrong column": ({}, ["data.text_column=body"], ["body", "text"]),
    "undecodable bytes": (
        dict(train=lines(GOOD[:3]) + b'{"text": "\xff\xfe", "label": "sport"}\n'),
        [],
        ["train.jsonl", "4"],
    ),
    "an unknown key": ({}, ["joint.stpes=3"], ["joint.stpes", "joint.steps"]),
    "a value of the wrong type": ({}, ["joint.steps=many"], ["joint.steps=many"]),
    "a missing corpus": ({}, ["corpus=nowhere"], ["nowhere"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    splits, settings, words = CASES[case]
    source = "nowhere.csv" if splits is None else task(tmp_path / "task", **splits)
    assert main(["train", f"task={source}", "run=x", f"cache={tmp_path / 'cache'}", *settings]) == 2
    captured = capsys.readouterr()
    message = captured.err.splitlines()[-1]
    assert message.startswith("tlm: ")
    assert "Traceback" not in captured.err
    for word in words:
        assert word in message, message
    assert not (tmp_path / "runs").exists()


def test_a_corpus_that_no_query_matches(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(lines([{"text": "весна " + "лето " * i} for i in range(1, 20)]))
    folder = task(tmp_path / "task")
    assert main(["train", f"task={folder}", f"corpus={corpus}", "run=x", f"cache={tmp_path / 'cache'}"]) == 2
    assert "no document of the corpus shares a term" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "runs").exists()
