"""`tlm pool show`: its figures against a count by hand, its page, and what it says of a broken pool."""

import json
import os
import re
from pathlib import Path

import pytest
from conftest import write_jsonl

from tasks.pool import open_pool
from tlm.cli import main
from tlm.pool import survey


@pytest.fixture
def folder(tmp_path):
    """Two tasks with choices (of the same labels, and of others each time) and one without; texts with markup."""
    common = {"shard": "one", "family": "[bold]f", "source": "s"}
    write_jsonl(
        tmp_path / "tasks.jsonl",
        [
            {"task": "labels", "category": "mood", "format": "choice", "prompts": ["{input} It is"], **common},
            {"task": "places", "category": "riddles", "format": "choice", "prompts": ["{input}\n{choices}"], **common},
            {"task": "free", "category": "mood", "format": "generate", "prompts": ["<b>{input}</b>"], **common},
        ],
    )
    (tmp_path / "splits.json").write_text('{"train_categories": ["mood"], "heldout_categories": ["riddles"]}')
    rows = [("labels", "one two", "good", ["good", "bad"])] * 3 + [("labels", "one two", "bad", ["bad", "good"])]
    rows += [("places", "a b c", "x", ["x", "y"]), ("places", "a b c", "p", ["p", "q", "r", "s"])]
    rows += [("places", "<script>alert(1)</script>", "n", ["m", "n"]), ("free", "[red]w " * 200, "w", None)]
    names = ("task", "input", "target", "choices")
    write_jsonl(
        tmp_path / "one.jsonl",
        [{**dict(zip(names, row, strict=True)), "id": f"i{i}", "split": "train"} for i, row in enumerate(rows)],
    )
    return tmp_path


def test_counts_by_hand(folder):
    pool = open_pool(str(folder))
    labels, places, free = survey(pool, pool.select(["train", "heldout"]))
    assert labels.commonest == (0.75, "good")  # whatever place it has
    assert places.commonest == (2 / 3, "choice 1")
    assert free.commonest is None
    assert [c.chance / c.splits.total() for c in (labels, places)] == pytest.approx(
        [1 / 2, (1 / 2 + 1 / 4 + 1 / 2) / 3]
    )
    assert [list(c.words) for c in (labels, places, free)] == [[2] * 4, [3, 3, 1], [200]]


def test_the_terminal(folder, capsys):
    assert main(["pool", "show", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "categories: 2; families: 1; tasks: 3; instances: 8 (train 8, test 0)" in shown
    assert re.search(r"\nmood +2 +1 +5 +2 +\d+ +50% +75%", shown)
    assert re.search(r"\nriddles +1 +1 +3 +3 +3 +42% +67%", shown)
    assert re.search(r"\n\[bold\]f +3 +2 +8", shown)  # names are no markup
    assert re.search(r"\n128 to 255 +1 +12.5%", shown)
    assert re.search(r"places +choice 1 +67% +42%", shown)
    assert main(["pool", "show", str(folder), "categories=[riddles]", "examples=1"]) == 0
    shown = capsys.readouterr().out
    assert "mood" not in shown
    assert re.search(r"\nplaces .* [0-9a-f]{12}", shown)
    assert "=> " in shown


def test_the_page_holds_itself_and_escapes_texts(folder, tmp_path, capsys):
    page = tmp_path / "pages" / "pool.html"
    assert main(["pool", "show", str(folder), f"out={page}"]) == 0
    text = page.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)|@import|url\(""", text)
    assert "<b>[red]w" not in text
    assert "<script>alert" not in text
    for name in ("labels", "places", "free", "mood", "riddles", "Examples"):
        assert name in text


def test_a_pool_broken_in_the_middle_is_one_sentence(folder, tmp_path, capsys):
    lines = (folder / "one.jsonl").read_text().splitlines(keepends=True)
    (folder / "one.jsonl").write_text("".join([*lines[:4], lines[4][:30]]))
    page = tmp_path / "pool.html"
    assert main(["pool", "show", str(folder), f"out={page}"]) == 2
    said = capsys.readouterr()
    assert re.fullmatch(r"tlm: .*one\.jsonl, line 5: not JSON: .*\n", said.err)
    assert said.out == ""
    assert not page.exists()


def test_what_is_no_pool(tmp_path, capsys):
    assert main(["pool", "show", str(tmp_path / "nowhere")]) == 2
    assert "splits.json: no such file" in capsys.readouterr().err
    assert main(["pool", "show"]) == 2
    assert "say which pool, as in `tlm pool show FOLDER`" in capsys.readouterr().err


def test_chance_is_what_the_shared_pool_states():
    if not os.environ.get("TLM_DATA"):
        pytest.skip("needs TLM_DATA with pool/")
    path = Path(os.environ["TLM_DATA"]) / "pool"
    stated = {line["task"]: line.get("chance") for line in map(json.loads, (path / "tasks.jsonl").open())}
    pool = open_pool(str(path))
    counted = [c for c in survey(pool, pool.select(["intent_classification", "word_sense"])) if c.same_choices]
    found = {c.task.name: c.chance / c.splits.total() if c.labels else None for c in counted}
    assert len(found) > 15
    assert found == pytest.approx({name: stated[name] for name in found}, abs=1e-4)
