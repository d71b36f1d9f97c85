"""Splits: stable under reordering, no text on both sides, few-shot cuts that keep the labels."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.splits import count_overlap, cut, drop_duplicates, split_by_hash, text_key
from tasks.types import Example


def examples(*pairs) -> list[Example]:
    return [Example(f"e{i}", text, label) for i, (text, label) in enumerate(pairs)]


def test_hash_fractions_are_met_on_average_and_a_text_keeps_its_split(real_text):
    texts = [f"{text} {i}" for i, text in enumerate(real_text)] * 3
    counts = Counter(split_by_hash(text, 0.1, 0.2) for text in set(texts))
    n = len(set(texts))
    for split, share in {"train": 0.7, "dev": 0.1, "test": 0.2}.items():
        assert abs(counts[split] - share * n) < 4 * np.sqrt(n * share * (1 - share))
    assert split_by_hash("A text, of sorts!", 0.1, 0.2) == split_by_hash("a text of  sorts", 0.1, 0.2)
    # A change of the rule would move the examples of every task that is split by hash.
    places = [int(hashlib.sha256(f"text {i}".encode()).hexdigest()[:16], 16) / 16**16 for i in range(12)]
    expected = ["test" if place < 0.2 else "dev" if place < 0.4 else "train" for place in places]
    assert [split_by_hash(f"text {i}", 0.2, 0.2) for i in range(12)] == expected


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("What is this?", "what is  this", True),
        ("“Quoted” text…", '"Quoted" text', True),
        ("[[ a ]] of << b >>", "<< a >> of [[ b ]]", False),
        ("!!!", "???", False),
        ("C++", "C", False),
        ("Straße", "STRASSE", True),
    ],
)
def test_which_texts_count_as_the_same(a, b, same):
    assert (text_key(a) == text_key(b)) is same


def test_overlap_and_duplicates_by_hand():
    train = examples(("a", "x"), ("A.", "x"), ("b", "x"), ("b", "y"), ("c", "y"), ("d", "y"), ("d", "y"))
    dev, test = examples(("c!", "y"), ("e", "x")), examples(("d", "y"), ("e", "x"), ("f", "x"))
    assert count_overlap({"train": train, "dev": dev, "test": test}) == {
        "train_in_dev": 1, "train_in_test": 2, "dev_in_test": 1, "test_in_train": 1,
    }  # fmt: skip
    rest, counts = drop_duplicates(train, dev + test)
    assert [(e.text, e.label) for e in rest] == [("a", "x"), ("b", "x"), ("b", "y")]
    assert counts == {"in_dev_or_test": 3, "repeats": 1, "with_several_labels": 1}


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    limit=st.integers(1, 200),
    seed=st.integers(0, 3),
)
def test_limit_is_exact_stratified_and_keeps_order(sizes, limit, seed):
    train = examples(*((f"{label} {i}", str(label)) for label, size in enumerate(sizes) for i in range(size)))
    part = cut(train, limit=limit, seed=seed)
    assert part == cut(train, limit=limit, seed=seed)
    assert len(part) == min(limit, len(train))
    assert [e.id for e in part] == sorted((e.id for e in part), key=lambda i: int(i[1:]))
    counts = Counter(e.label for e in part)
    for label, size in enumerate(sizes):
        share = len(part) * size / len(train)
        if limit >= len(sizes):
            assert counts[str(label)] >= 1
        # Labels that were lifted to one example are paid for by the others, at most one each.
        assert share - len(sizes) <= counts[str(label)] <= share + 1


def test_per_label_counts_nesting_and_seed():
    train = examples(
        *((f"{label} {i}", label) for label, size in {"a": 30, "b": 8, "c": 2}.items() for i in range(size))
    )
    five, ten = cut(train, per_label=5, seed=1), cut(train, per_label=10, seed=1)
    assert Counter(e.label for e in five) == {"a": 5, "b": 5, "c": 2}
    assert set(five) <= set(ten)
    assert five != cut(train, per_label=5, seed=2)
    assert cut(train) == train


def test_every_example_is_as_likely_as_another():
    train = examples(*((str(i), "a") for i in range(20)), *((str(i), "b") for i in range(20)))
    seen = Counter(e.id for seed in range(500) for e in cut(train, limit=10, seed=seed))
    assert len(seen) == 40
    assert all(abs(count - 125) < 5 * np.sqrt(500 * 0.25 * 0.75) for count in seen.values())
