"""`tlm pool build` from small files of the form of the packages bigbench and evals."""

import json
import tarfile
from pathlib import Path

import pytest

from tasks.pool import open_pool
from tasks.prompts import render
from tlm.cli import main


def riddle(i):
    return {"input": f"riddle {i}", "target_scores": {f"right {i}": 1, f"wrong {i}": 0, "never": 0}}


@pytest.fixture
def bigbench(tmp_path) -> Path:
    """An archive of three tasks and one too small; braces in a prefix, ties, repeats and a list of targets."""
    root = tmp_path / "bigbench-1.0.0" / "bigbench" / "benchmark_tasks"
    tie = {"input": "tie", "target_scores": {"a": 1, "b": 1}}
    tasks = {
        "riddles": {
            "description": "Solve it.",
            "keywords": ["riddle", "causal reasoning"],
            "task_prefix": "Use {braces}.",
            "examples": [
                *map(riddle, range(40)),
                tie,
                riddle(3),
                {"input": "x" * 2001, "target_scores": {"a": 1, "b": 0}},
            ],
        },
        "sums/small": {
            "description": "Add.",
            "keywords": ["zero-shot", "arithmetic"],
            "example_input_prefix": "\nSum: ",
            "example_output_prefix": "\nIs: ",
            "examples": [{"input": f"{i}+1", "target": [str(i + 1), "many"]} for i in range(700)],
        },
        "tiny": {"description": "?", "keywords": [], "examples": [{"input": "a", "target": "b"}] * 30},
    }
    for name, task in tasks.items():
        (root / name).mkdir(parents=True)
        (root / name / "task.json").write_text(json.dumps({"name": name, **task}))
    (root / "program").mkdir()
    (root / "program" / "task.py").write_text("raise SystemExit")
    archive = tmp_path / "bigbench-1.0.0.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(tmp_path / "bigbench-1.0.0", "bigbench-1.0.0")
    return archive


@pytest.fixture
def evals(tmp_path) -> Path:
    """One eval of two answers, with lines that end in a carriage return, one of free ones, one of another form."""
    root, system = tmp_path / "data", {"role": "system", "content": "Answer yes or no."}
    lines = {
        "fruit": [{"input": [system, {"role": "user", "content": f"Is {i} ripe?"}], "ideal": ["no", "yes"][i % 2]}
                  for i in range(60)],
        "names": [{"input": [{"role": "system", "content": f"You are {i}."}, {"role": "user", "content": "Who?"}],
                   "ideal": [str(i)]} for i in range(60)],
        "chess": [{"moves": "e4", "ideal": "e5"}] * 60,
    }  # fmt: skip
    for name, records in lines.items():
        (root / name).mkdir(parents=True)
        (root / name / "samples.jsonl").write_bytes(b"\r".join(json.dumps(r).encode() for r in records))
    return root


def build(tmp_path, *settings):
    return main(["pool", "build", f"out={tmp_path / 'pool'}", *settings])


def test_a_pool_of_both_packages(tmp_path, bigbench, evals, capsys):
    assert build(tmp_path, f"bigbench={bigbench}", f"evals={evals}") == 0
    said = capsys.readouterr().out
    assert "4 tasks (2 of bigbench, 2 of evals), 1 of them held out; 1 were too small" in said
    pool = open_pool(str(tmp_path / "pool"))
    assert {t.name: (t.category, t.family, t.format) for t in pool.tasks.values()} == {
        "bb_riddles": ("causal_reasoning", "bigbench/riddles", "choice"),
        "bb_sums_small": ("arithmetic", "bigbench/sums", "generate"),
        "oe_fruit": ("openai_evals", "oe/fruit", "choice"),
        "oe_names": ("openai_evals", "oe/names", "generate"),
    }
    assert [task.name for task in pool.heldout] == ["bb_riddles"]
    instances = list(pool.instances())
    riddles = [i for i in instances if i.task == "bb_riddles"]
    assert {i.input for i in riddles} == {f"riddle {i}" for i in range(40)}  # no tie, no repeat, none too long
    assert all(i.target == f"right {i.input.split()[1]}" and len(i.choices) == 3 for i in riddles)
    assert len({i.choices.index(i.target) for i in riddles}) == 3  # shuffled
    sums = [i for i in instances if i.task == "bb_sums_small"]
    assert [sum(i.split == split for i in sums) for split in ("train", "test")] == [400, 100]
    assert all(i.target == str(int(i.input.split("+")[0]) + 1) for i in sums)
    fruit = [i for i in instances if i.task == "oe_fruit"]
    assert {i.choices for i in fruit} == {("no", "yes")}
    assert all(i.target == ["no", "yes"][int(i.input.split()[1]) % 2] for i in fruit)
    assert {i.input for i in instances if i.task == "oe_names"} >= {"You are 7.\n\nWho?"}


def test_the_prompts_are_the_sources_own(tmp_path, bigbench, evals):
    assert build(tmp_path, f"bigbench={bigbench}", f"evals={evals}") == 0
    pool = open_pool(str(tmp_path / "pool"))

    def texts(name):
        return [render(prompt, "I", "t", ["t", "u"]).text for prompt in pool.tasks[name].prompts]

    assert texts("bb_riddles") == [
        "Use {braces}.\nQ: I\nA:", "Solve it.\n\nI\nAnswer:", "Solve it.\n\nI\nOptions:\n- t\n- u\nAnswer:",
    ]  # fmt: skip
    assert texts("bb_sums_small") == ["Sum: I\nIs:", "Add.\n\nI\nAnswer:"]
    assert texts("oe_fruit") == ["Answer yes or no.\n\nI", "Answer yes or no.\n\nI\nAnswer:"]


def test_the_same_pool_from_the_unpacked_folder(tmp_path, bigbench, evals):
    for name, source in (("one", bigbench), ("two", bigbench.parent / "bigbench-1.0.0")):
        assert main(["pool", "build", f"out={tmp_path / name}", f"bigbench={source}", f"evals={evals}"]) == 0
    for name in ("tasks.jsonl", "splits.json", "bigbench.jsonl.gz", "evals.jsonl.gz"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_bad_sources_leave_nothing_behind(tmp_path, bigbench, evals, capsys):
    whole = bigbench.read_bytes()
    bigbench.write_bytes(whole[: len(whole) // 2])
    assert build(tmp_path, f"bigbench={bigbench}", f"evals={evals}") == 2
    assert "bigbench-1.0.0.tar.gz: not a sound archive" in capsys.readouterr().err
    bigbench.write_bytes(whole)
    with (evals / "fruit" / "samples.jsonl").open("a") as file:
        file.write('\n{"input": ')
    assert build(tmp_path, f"bigbench={bigbench}", f"evals={evals}") == 2
    assert "samples.jsonl, line 61: not JSON" in capsys.readouterr().err
    assert build(tmp_path, "bigbench=nowhere.tar.gz", f"evals={evals}") == 2
    assert "nowhere.tar.gz: no such file; `pip download" in capsys.readouterr().err
    assert not (tmp_path / "pool").exists()


def test_another_folder_is_not_overwritten(tmp_path, bigbench, evals, capsys):
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "mine.txt").write_text("mine")
    assert build(tmp_path, f"bigbench={bigbench}", f"evals={evals}") == 2
    assert "is there already; delete it or name another folder" in capsys.readouterr().err
    assert (tmp_path / "pool" / "mine.txt").read_text() == "mine"
