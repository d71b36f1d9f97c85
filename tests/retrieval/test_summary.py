"""The numbers of a manifest, against counts made from the selection's own lines."""

from collections import Counter

import numpy as np
import pytest
from test_select import cache, make_task, manual, task  # noqa: F401

from retrieval.select import select


@pytest.fixture(scope="module")
def selection(task, manual, cache):  # noqa: F811
    return select(task, manual, cache=cache, k=30, max_documents=300)


def test_scores_are_counted_in_steps_and_percentiles(selection):
    scores = selection.manifest["scores"]
    found = np.array([record["score"] for record in selection.records()])
    bounds, counts = scores["histogram"]["bounds"], scores["histogram"]["documents"]
    assert sum(counts) == len(found)
    for low, high, count in zip(bounds[1:], bounds[2:], counts[1:-1], strict=False):
        assert count == ((found >= low) & (found < high)).sum()
    percentiles = scores["percentiles"]
    assert (percentiles["0"], percentiles["100"]) == (round(found.min(), 4), round(found.max(), 4))
    assert percentiles["50"] == pytest.approx(np.median(found), abs=1e-4)


def test_what_each_query_fetched(selection, task):  # noqa: F811
    fetched = Counter(record["query"] for record in selection.records())
    each = [fetched[example.id] for example in task.splits["train"]]
    steps = selection.manifest["queries"]["fetched"]
    assert sum(step["queries"] for step in steps) == len(each)
    for step in steps:
        assert step["queries"] == sum(step["from"] <= count <= step["to"] for count in each) > 0


def test_terms_add_up_as_the_formula_says(manual, real_text, tmp_path):  # noqa: F811
    """With one query of one known term, all of each score is that term's."""
    selection = select(make_task(["attribute qwzx"]), manual, cache=tmp_path, k=20)
    assert list(selection.manifest["terms"]) == ["attribute"]
    assert selection.manifest["terms"]["attribute"] == pytest.approx(selection.scores.sum(), abs=0.06)


def test_samples_go_from_the_first_to_the_last(selection, task):  # noqa: F811
    records, samples = list(selection.records()), selection.manifest["samples"]
    assert [samples[0]["id"], samples[-1]["id"]] == [records[0]["id"], records[-1]["id"]]
    texts = {example.id: example.text for example in task.splits["train"]}
    for sample in samples:
        record = next(record for record in records if record["id"] == sample["id"])
        assert sample["query"]["id"] == record["query"]
        for shown, whole in ((sample["text"], record["text"]), (sample["query"]["text"], texts[record["query"]])):
            assert " ".join(whole.split()).startswith(shown.removesuffix(" ..."))
            assert len(shown.split()) <= 31


def test_leak_examples_name_the_text_of_dev_and_of_test(real_text, manual, tmp_path):  # noqa: F811
    """A passage of one document in a dev text, of another in a test text; both documents would be found."""
    rows = [next(row for row in range(at, len(manual)) if len(manual[row].text.split()) >= 20) for at in (100, 200)]
    first, second = (manual[row].text for row in rows)  # each Python has another manual
    train = [" ".join(first.split()[-20:]), " ".join(second.split()[-20:])]
    task = make_task(train, dev=["x", " ".join(first.split()[:20])], test=["y", "z", " ".join(second.split()[:20])])  # noqa: F811
    assert min(len(first.split()), len(second.split())) >= 20
    manifest = select(task, manual, cache=tmp_path, k=3).manifest
    named = {(e["row"], e["split"], e["text"]) for e in manifest["leaks"]["examples"]}
    assert {(rows[0], "dev", "dev-1"), (rows[1], "test", "test-2")} <= named
