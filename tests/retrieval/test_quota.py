import random
from collections import Counter

import numpy as np
import pytest
from test_select import cache, make_task, manual  # noqa: F401

from retrieval.quota import draft
from retrieval.ranking import Found
from retrieval.select import select
from tasks.errors import InputError
from tasks.types import Task


def ranking(rows: list[int]) -> Found:
    size = len(rows)
    return Found(np.array(rows), np.arange(1, size + 1, dtype=np.int32), np.zeros(size), np.zeros(size, np.int32))


def drafted(rankings: list[list[int]], shares: list[float], **bounds) -> list[tuple[int, int]]:
    """(task, row) in the order of the draft."""
    words = bounds.pop("words", np.ones(200, np.int32))
    places, turns = draft([ranking(rows) for rows in rankings], shares, words, **bounds)
    rows = [iter([rankings[t][place] for place in given]) for t, given in enumerate(places)]
    return [(int(t), next(rows[t])) for t in turns]


def test_one_task_is_its_ranking_cut():
    assert [row for _, row in drafted([[5, 3, 9, 1]], [1.0])] == [5, 3, 9, 1]
    assert [row for _, row in drafted([[5, 3, 9, 1]], [1.0], max_documents=2)] == [5, 3]
    words = np.arange(200, dtype=np.int32)
    assert [row for _, row in drafted([[5, 3, 9, 1]], [1.0], max_words=8, words=words)] == [5, 3]
    assert [row for _, row in drafted([[5, 3, 9, 1]], [1.0], max_words=16, words=words)] == [5, 3]  # 9 does not fit


def test_a_document_that_both_want_goes_to_one():
    assert drafted([[1, 2, 3], [1, 2, 4]], [0.5, 0.5]) == [(0, 1), (1, 2), (0, 3), (1, 4)]


def test_a_smaller_draft_is_a_prefix_and_shares_hold():
    rng = random.Random(0)
    rankings = [rng.sample(range(200), 150) for _ in range(3)]
    words = np.array([rng.randint(1, 30) for _ in range(200)], np.int32)
    whole = drafted(rankings, [0.5, 0.3, 0.2], words=words, max_words=2_000)
    spent = Counter()
    for task, row in whole:
        spent[task] += int(words[row])
    assert 1_970 < sum(spent.values()) <= 2_000
    for task, share in enumerate([0.5, 0.3, 0.2]):
        assert abs(spent[task] - 2_000 * share) <= 30
    for bound in (100, 999):
        part = drafted(rankings, [0.5, 0.3, 0.2], words=words, max_words=bound)
        assert part == whole[: len(part)]
    assert len({row for _, row in whole}) == len(whole)


def test_what_one_task_lacks_goes_to_the_others():
    assert Counter(t for t, _ in drafted([[1, 2], list(range(10, 60))], [0.9, 0.1], max_documents=20)) == {0: 2, 1: 18}


@pytest.fixture(scope="module")
def tasks(real_text) -> list[Task]:
    """Two tasks; the test text of the second is a passage that the first one finds."""
    leaked = " ".join(real_text[3].split()[:20])
    assert len(leaked.split()) == 20
    return [
        make_task([real_text[3], *real_text[::100]], name="one"),
        make_task(real_text[50::100], test=[leaked], name="two"),
    ]


def test_a_selection_for_two_tasks(tasks, manual, cache):  # noqa: F811
    both = select(tasks, manual, cache=cache, k=50, max_documents=90, quota=[2, 1])
    manifest = both.manifest
    one, two = manifest["tasks"]
    assert (one["documents"], two["documents"]) == (60, 30)
    assert (one["k"], two["k"]) == (67, 33)
    assert (one["task"], two["task"], manifest["task"]) == ("one", "two", "one+two")
    records = list(both.records())
    assert Counter(record["task"] for record in records) == {"one": 60, "two": 30}
    by_id = {document.id: row for row, document in enumerate(manual)}
    assert [by_id[record["id"]] for record in records] == both.rows.tolist()
    for name, part in (("one", one), ("two", two)):
        mine = [record for record in records if record["task"] == name]
        assert sum(len(record["text"].split()) for record in mine) == part["words"]
        assert [record["rank"] for record in mine] == sorted(record["rank"] for record in mine)
        assert part["kl"]["reduction"] > 0
    assert 3 not in {int(record["id"][1:]) for record in records}  # it leaks the test text of the other task
    assert manifest["leaks"]["examples"][0]["task"] == "two"
    train = [example for task in tasks for example in task.splits["train"]]
    assert [record["query"] for record in records] == [train[query].id for query in both.queries]
    assert manifest["queries"]["number"] == len(train) == manifest["train_texts"]


def test_each_task_keeps_the_order_that_it_has_alone(tasks, manual, cache):  # noqa: F811
    both = select(tasks, manual, cache=cache, k=20)
    alone = [select(task, manual, cache=cache, k=20) for task in tasks]
    leaked = both.leaks.tolist()  # of the second task's test text, which the first alone does not know of
    assert sorted([*both.rows, *leaked]) == sorted({row for each in alone for row in each.rows.tolist()})
    for task, each in zip(tasks, alone, strict=True):
        mine = [r["id"] for r in both.records() if r["task"] == task.name]
        order = [r["id"] for r in each.records() if r["id"] in set(mine)]
        assert mine == order


@pytest.mark.parametrize(("quota", "words"), [([1], "2 tasks"), ([1, 0], "above 0"), ([1, float("nan")], "above 0")])
def test_bad_quota(quota, words, tasks, manual, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match=words):
        select(tasks, manual, cache=tmp_path, quota=quota)
    with pytest.raises(InputError, match="named twice"):
        select([tasks[0], tasks[0]], manual, cache=tmp_path)
