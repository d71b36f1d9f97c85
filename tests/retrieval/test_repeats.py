import random

import pytest
from test_select import make_task

from retrieval.analyze import ANALYZERS
from retrieval.corpus import Document, build_corpus
from retrieval.repeats import Repeats
from retrieval.select import select
from tasks.errors import InputError


def slow_runs(text: str) -> frozenset[tuple]:
    """The set of five words in a row."""
    words = ANALYZERS["words"].terms(text)
    return frozenset(tuple(words[i : i + 5]) for i in range(len(words) - 4)) or frozenset([tuple(words)])


def similarity_of(one: frozenset, other: frozenset) -> float:
    return len(one & other) / len(one | other)


def changed(text: str, rng: random.Random, share: float) -> str:
    return " ".join(rng.choice(["xx", "yy", "zz"]) if rng.random() < share else word for word in text.split())


@pytest.fixture(scope="module")
def texts(real_text) -> list[str]:
    """150 paragraphs of 40 words or more, and two copies of each, in which few or many words are changed."""
    rng = random.Random(1)
    chosen = [text for text in real_text if len(text.split()) >= 40][:150]
    copies = [changed(text, rng, share) for text in chosen for share in (0.015, 0.06)]
    mixed = [*chosen, *copies]
    rng.shuffle(mixed)
    return mixed


@pytest.mark.parametrize("similarity", [0.5, 0.8])
def test_drops_what_is_alike_to_one_taken_before(similarity, texts, tmp_path):
    corpus = build_corpus((Document(str(i), text) for i, text in enumerate(texts)), tmp_path / "store")
    repeats, taken, missed = Repeats(corpus, similarity), [], 0
    runs = [slow_runs(document.text) for document in corpus]
    for row in range(len(corpus)):
        alike = any(similarity_of(runs[row], runs[other]) >= similarity for other in taken)
        refused = repeats.refuses(row)
        assert alike or not refused  # never wrongly
        missed += alike and not refused
        if not refused:
            taken.append(row)
    assert repeats.dropped == len(corpus) - len(taken) > 50
    assert missed <= 0.01 * repeats.dropped
    assert len(repeats.examples) == 3
    for example in repeats.examples:
        row, other = example["row"], next(row for row in taken if corpus[row].id == example["like"])
        assert corpus[row].id == example["id"]
        assert example["similarity"] == round(similarity_of(runs[row], runs[other]), 3) >= similarity


def test_a_selection_fills_its_bound_without_repeats(texts, tmp_path):
    corpus = build_corpus((Document(str(i), text) for i, text in enumerate(texts)), tmp_path / "store")
    task = make_task(texts[:40])
    whole = select(task, corpus, cache=tmp_path, k=100, max_documents=80)
    assert "near_duplicates" not in whole.manifest
    chosen = select(task, corpus, cache=tmp_path, k=100, max_documents=80, max_similarity=0.8)
    assert len(chosen) == 80
    runs = [slow_runs(document.text) for document in corpus]
    rows, all_rows = chosen.rows.tolist(), whole.rows.tolist()
    assert all(similarity_of(runs[one], runs[other]) < 0.8 for i, one in enumerate(rows) for other in rows[:i])
    dropped = [row for row in all_rows if row not in rows]
    assert chosen.manifest["near_duplicates"]["dropped"] >= len(dropped) > 5  # others have come up in their place
    for row in dropped:
        better = [other for other in all_rows[: all_rows.index(row)] if other in rows]
        assert any(similarity_of(runs[row], runs[other]) >= 0.8 for other in better)


def test_bad_similarity(texts, tmp_path):
    corpus = build_corpus((Document(str(i), text) for i, text in enumerate(texts)), tmp_path / "store")
    with pytest.raises(InputError, match="max_similarity=1.5 must be above 0"):
        select(make_task(texts[:2]), corpus, cache=tmp_path, max_similarity=1.5)
