"""Pools: what is read, what is refused, and that nothing held out trains."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from tasks.errors import InputError
from tasks.pool import Instance, open_pool, refuse_heldout


def task_line(name, category, format="choice", **more):
    line = {"task": name, "category": category, "format": format, "prompts": ["{input}"], "shard": "one"}
    return {**line, "n_train": 2, "n_test": 1, **more}


def instance_lines(name, inputs, choices=("yes", "no")):
    choices = list(choices) if choices else None
    return [
        {"task": name, "id": f"{name}-{i}", "split": "test" if i == 2 else "train", "input": text,
         "target": choices[i % 2] if choices else text.upper(), "choices": choices}
        for i, text in enumerate(inputs)
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Three tasks of two shards; `hidden` is held out, and two inputs of `seen` stand in it."""
    tasks = [
        task_line("seen", "reviews", family="opinions", n_train=4),
        task_line("hidden", "logic", prompts=["{input}\n{choices}", "Is it so? {input}"]),
        task_line("shout", "strings", "generate", shard="two"),
    ]
    seen = instance_lines("seen", ["I liked it.", "Dull", "Never again!", "All  MEN are mortal", "Rain is wet"])
    shards = {
        "one": [*seen, *instance_lines("hidden", ["all men are mortal.", "Cats bark", "rain is wet!"])],
        "two": instance_lines("shout", ["a", "b", "c"], None),
    }
    write(tmp_path / "tasks.jsonl", tasks)
    (tmp_path / "splits.json").write_text(
        json.dumps({"train_categories": ["reviews", "strings"], "heldout_categories": ["logic"]})
    )
    for shard, lines in shards.items():
        with gzip.open(tmp_path / f"{shard}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    return tmp_path


def write(path: Path, lines) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def change(folder, shard, edit) -> None:
    """`edit` changes the list of a shard's records in place."""
    path = folder / f"{shard}.jsonl.gz"
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    edit(lines)
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))


def test_reads_tasks_and_instances(folder):
    pool = open_pool(f"{folder}/")
    assert list(pool.tasks) == ["seen", "hidden", "shout"]
    assert pool.sides == {"train": ("reviews", "strings"), "heldout": ("logic",)}
    assert [pool.tasks[name].family for name in pool.tasks] == ["opinions", "hidden", "shout"]
    assert len(list(pool.instances())) == 11
    (last,) = pool.instances([pool.tasks["hidden"]], "test")
    assert last == Instance("hidden", "hidden-2", "test", "rain is wet!", "yes", ("yes", "no"))
    assert [i.target for i in pool.instances([pool.tasks["shout"]])] == ["A", "B", "C"]


def test_reads_only_the_shards_it_needs(folder):
    (folder / "one.jsonl.gz").unlink()
    pool = open_pool(str(folder))
    assert len(list(pool.instances([pool.tasks["shout"]]))) == 3
    with pytest.raises(InputError, match=r"one.jsonl.gz: no such file"):
        list(pool.instances())


def test_selects_by_category_and_side(folder):
    pool = open_pool(str(folder))
    assert [task.name for task in pool.select(["train"])] == ["seen", "shout"]
    assert [task.name for task in pool.select(["heldout", "strings"])] == ["hidden", "shout"]
    with pytest.raises(InputError, match="no category 'logics', did you mean 'logic'"):
        pool.select(["logics"])


def test_held_out_categories_never_train(folder):
    pool = open_pool(str(folder))
    refuse_heldout(pool, pool.select(["train"]))
    with pytest.raises(InputError, match=r"held-out categories never train: logic \(hidden\)"):
        refuse_heldout(pool, pool.tasks.values())
    with pytest.raises(InputError, match="never train"):
        next(pool.training_instances(list(pool.tasks.values()), Counter()))


def test_instances_of_held_out_tasks_are_dropped_and_counted(folder):
    pool, dropped = open_pool(str(folder)), Counter()
    inputs = [i.input for i in pool.training_instances(pool.select(["train"]), dropped)]
    assert inputs == ["I liked it.", "Dull", "a", "b"]  # case, spacing, a full stop apart they were the same
    assert dropped == {"seen": 2}


def test_other_categories_may_be_held_out(folder):
    pool, dropped = open_pool(str(folder), heldout=["reviews"]), Counter()
    assert pool.sides == {"train": ("strings", "logic"), "heldout": ("reviews",)}
    inputs = [i.input for i in pool.training_instances(pool.select(["logic"]), dropped)]
    assert (inputs, dropped) == (["Cats bark"], {"hidden": 1})  # its other training text stands in `seen`
    with pytest.raises(InputError, match=r"never train: reviews \(seen\)"):
        refuse_heldout(pool, pool.select(["reviews", "logic"]))


def test_versions_follow_the_prompts(folder):
    before = {name: task.version for name, task in open_pool(str(folder)).tasks.items()}
    lines = [json.loads(line) for line in (folder / "tasks.jsonl").read_text().splitlines()]
    lines[1]["prompts"][0] = "{input}\nOne of:\n{choices}"
    write(folder / "tasks.jsonl", lines)
    after = {name: task.version for name, task in open_pool(str(folder)).tasks.items()}
    assert [name for name in before if before[name] != after[name]] == ["hidden"]


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda r: r[3].update(target="maybe"), "line 4: the target 'maybe' is none of its choices"),
        (lambda r: r[3].update(choices=None), "line 4: seen is a task of format choice"),
        (lambda r: r[3].update(choices=[]), "line 4: seen is a task of format choice"),
        (lambda r: r[3].update(split="dev"), "line 4: split 'dev'"),
        (lambda r: r[3].update(input=7), "line 4: 'input' must be a text, not '7'"),
        (lambda r: r[3].update(task="shout"), "line 4: tasks.jsonl has no task 'shout' in this shard"),
        (lambda r: r.pop(), r"one.jsonl.gz: 0 test instances of hidden, but tasks.jsonl tells of 1; the file was cut"),
    ],
)
def test_broken_instances(folder, edit, named):
    change(folder, "one", edit)
    with pytest.raises(InputError, match=named):
        list(open_pool(str(folder)).instances())


def test_choices_in_a_generated_task(folder):
    change(folder, "two", lambda records: records[1].update(choices=["a"]))
    with pytest.raises(InputError, match=r"two.jsonl.gz, line 2: choices, but shout is a task of format generate"):
        list(open_pool(str(folder)).instances())


def test_a_file_broken_in_the_middle(folder):
    path = folder / "one.jsonl.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"one.jsonl.gz: the compressed file is truncated"):
        list(open_pool(str(folder)).instances())
    lines = gzip.decompress(whole).splitlines(keepends=True)
    path.unlink()
    (folder / "one.jsonl").write_bytes(b"".join([*lines[:4], lines[4][:20]]))
    with pytest.raises(InputError, match=r"one.jsonl, line 5: not JSON"):
        list(open_pool(str(folder)).instances())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": "choose"}, "line 1: format 'choose'"),
        ({"prompts": []}, "line 1: 'prompts' must be a list"),
        ({"prompts": ["{input}", "{text}"]}, "line 1, prompt 2: .* unknown field 'text'"),
        ({"prompts": ["{{ input.__class__ }}"]}, "line 1, prompt 1: .*unsafe"),
        ({"format": "generate", "prompts": ["{choices}"]}, "line 1, prompt 1: it lists choices"),
        ({"task": "hidden"}, "line 2: the task 'hidden' stands there twice"),
        ({"category": "films"}, "line 1: splits.json does not name the category 'films'"),
        ({"category": "strings"}, "splits.json: the category 'reviews' has no task"),
        ({"shard": 3}, "line 1: 'shard' must be a text"),
    ],
)
def test_broken_task_lists(folder, change, named):
    lines = [json.loads(line) for line in (folder / "tasks.jsonl").read_text().splitlines()]
    lines[0].update(change)
    write(folder / "tasks.jsonl", lines)
    with pytest.raises(InputError, match=named):
        open_pool(str(folder))


def test_broken_splits(folder):
    path = folder / "splits.json"
    path.write_text('{"train_categories": ["reviews", "strings", "logic"], "heldout_categories": ["logic"]}')
    with pytest.raises(InputError, match="'logic' is named twice"):
        open_pool(str(folder))
    path.write_text('{"train_categories": ["reviews"]}')
    with pytest.raises(InputError, match="'heldout_categories' must be a list"):
        open_pool(str(folder))
    path.unlink()
    with pytest.raises(InputError, match="splits.json: no such file"):
        open_pool(str(folder))


@pytest.fixture(scope="module")
def shared_pool():
    path = Path(os.environ.get("TLM_DATA", "")) / "pool"
    if not os.environ.get("TLM_DATA") or not path.exists():
        pytest.skip("needs TLM_DATA with pool/")
    return open_pool(str(path))


def test_the_shared_pool_is_what_its_readme_says(shared_pool):
    assert (len(shared_pool.tasks), len(shared_pool.heldout)) == (1549, 208)
    assert [len(shared_pool.sides[side]) for side in ("train", "heldout")] == [38, 8]
    assert sum(task.format == "choice" for task in shared_pool.heldout) == 205
    assert Counter(task.family for task in shared_pool.tasks.values()).most_common(2) == [
        ("bigbench/list_functions", 261), ("anthropic/persona", 135),
    ]  # fmt: skip


def test_the_shared_pool_keeps_its_sides_apart(shared_pool):
    """Its README: no input of 25 characters or more stands on both sides."""
    tasks, dropped = shared_pool.select(["train"]), Counter()
    kept = {instance.id for instance in shared_pool.training_instances(tasks, dropped)}
    assert len(kept) + sum(dropped.values()) == sum(task.stated["train"] for task in tasks)
    touched = shared_pool.instances([shared_pool.tasks[name] for name in dropped], "train")
    left_out = [instance.input for instance in touched if instance.id not in kept]
    assert 0 < len(left_out) == sum(dropped.values())
    assert max(map(len, left_out)) < 25
