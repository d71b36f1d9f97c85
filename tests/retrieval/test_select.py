import gzip
import json
import random
from collections import Counter

import numpy as np
import pytest
from slow_bm25 import slow_search

from retrieval.analyze import ANALYZERS
from retrieval.corpus import Corpus, Document, build_corpus, open_corpus
from retrieval.select import Selection, paper_k, select
from tasks.errors import InputError
from tasks.readers import read_task
from tasks.types import Example, Task

ENGLISH = ANALYZERS["english"]


def make_task(train: list[str], dev: list[str] = (), test: list[str] = (), name: str = "t") -> Task:
    splits = {
        split: tuple(Example(f"{split}-{i}", text, "x") for i, text in enumerate(texts))
        for split, texts in {"train": train, "dev": dev, "test": test}.items()
    }
    return Task(name, ("x",), "accuracy", splits, "made up", (), {})


@pytest.fixture(scope="module")
def manual(real_text, tmp_path_factory) -> Corpus:
    given = (Document(f"m{i}", text, f"part{i % 3}") for i, text in enumerate(real_text) if i % 25)
    return build_corpus(given, tmp_path_factory.mktemp("manual") / "store")


@pytest.fixture(scope="module")
def task(real_text) -> Task:
    """Paragraphs that the corpus lacks, a few of its own passages as dev texts, and a text that finds nothing."""
    train, rng = [*real_text[::50], "qwzx qwzx"], random.Random(5)
    dev = [" ".join(rng.choice(real_text).split()[:30]) for _ in range(40)]
    return make_task(train, dev, ["too short", *real_text[25::50]])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def slow_selection(task: Task, corpus: Corpus, k: int) -> list[tuple]:
    """(row, rank, score, query) by the definition, leaks included."""
    texts = [document.text for document in corpus]
    queries = [ENGLISH.terms(text) for text in task.texts("train")]
    best = {}
    for query, hits in enumerate(slow_search(texts, ENGLISH, "lucene", 1.2, 0.75, queries, k)):
        for rank, (row, score) in enumerate(hits, 1):
            hit = (rank, -score, query)
            best[row] = min(best.get(row, hit), hit)
    ordered = sorted((rank, negative, row, query) for row, (rank, negative, query) in best.items())
    return [(row, rank, -negative, query) for rank, negative, row, query in ordered]


def as_tuples(selection: Selection) -> list[tuple]:
    columns = (selection.rows, selection.ranks, selection.scores, selection.queries)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@pytest.mark.parametrize("k", [3, 40])
def test_equals_the_slow_definition_on_real_text(k, task, manual, cache):
    selection = select(task, manual, cache=cache, k=k, query_terms=10_000)
    expected = slow_selection(task, manual, k)
    leaks = set(selection.leaks.tolist())
    assert as_tuples(selection) == [hit for hit in expected if hit[0] not in leaks]

    manifest = selection.manifest
    dropped = [hit[0] for hit in expected if hit[0] in leaks]
    assert manifest["found"] == len(expected)
    assert manifest["leaks"]["dropped"] == len(dropped) > 0
    assert manifest["leaks"]["in_corpus"] == len(leaks)
    assert manifest["leaks"]["texts"] == 40 + len(task.splits["test"])
    assert 0 < len(manifest["leaks"]["examples"]) <= 3
    for example in manifest["leaks"]["examples"]:
        assert example["row"] in dropped
        assert example["shared"].split()[0] in manual[example["row"]].text.lower()


def test_lines_and_manifest_agree_with_the_arrays(task, manual, cache):
    selection = select(task, manual, cache=cache, k=5)
    records = list(selection.records())
    with gzip.open(selection.folder / "selection.jsonl.gz", "rt", encoding="utf-8") as lines:
        assert [json.loads(line) for line in lines] == records
    assert len(records) == len(selection) == selection.manifest["documents"]
    for record, (row, rank, score, query) in zip(records, as_tuples(selection), strict=True):
        document = manual[row]
        assert record == {
            "id": document.id, "text": document.text, "source": document.source,
            "rank": rank, "score": score, "query": f"train-{query}",
        }  # fmt: skip
    assert list(selection.texts()) == [record["text"] for record in records]
    sources = Counter(record["source"] for record in records)
    by_source = selection.manifest["by_source"]
    assert {name: entry["documents"] for name, entry in by_source.items()} == sources
    assert sum(entry["words"] for entry in by_source.values()) == selection.manifest["words"]
    assert selection.manifest["words"] == sum(len(record["text"].split()) for record in records)
    assert set(selection.manifest["seconds"]) == {"leaks", "index", "search", "union", "write", "kl"}
    assert len(selection.manifest["terms"]) == 10


def test_queries_that_find_nothing_are_reported(task, manual, cache):
    selection = select(task, manual, cache=cache, k=5)
    lost = len(task.splits["train"]) - 1
    hits = np.load(selection.folder / "hits.npy")
    assert hits.tolist() == [5] * lost + [0]
    report = selection.manifest["queries"]
    assert report["number"] == lost + 1
    assert report["without_hits"] == 1
    assert report["without_hits_examples"] == [f"train-{lost}"]
    assert report["hits"] == {"fewest": 0, "median": 5, "most": 5}


@pytest.mark.parametrize("selector", ["bm25", "random"])
def test_a_smaller_bound_gives_a_prefix(selector, task, manual, cache):
    def chosen(**bounds) -> Selection:
        return select(task, manual, cache=cache, k=20, selector=selector, seed=3, **bounds)

    large = chosen(max_documents=400)
    assert len(large) == 400
    for size in (1, 37, 399):
        small = chosen(max_documents=size)
        assert as_tuples(small) == as_tuples(large)[:size]
        assert list(small.texts()) == list(large.texts())[:size]
    words = manual.words[large.rows].cumsum()
    for bound in (int(words[99]), int(words[99]) + 1, int(words[100]) - 1):
        by_words = chosen(max_words=bound)
        assert by_words.manifest["words"] == words[99]
        assert as_tuples(by_words) == as_tuples(large)[:100]
    assert len(chosen(max_words=int(words[99]), max_documents=50)) == 50


def test_random_is_as_large_as_another_and_leaks_nothing(task, manual, cache):
    best = select(task, manual, cache=cache, k=5)
    chosen = select(task, manual, cache=cache, selector="random", like=best, seed=1)
    assert len(chosen) == len(best)
    assert len(set(chosen.rows.tolist())) == len(chosen)
    assert not set(chosen.rows.tolist()) & set(chosen.leaks.tolist())
    assert (chosen.queries == -1).all()
    assert {record["query"] for record in chosen.records()} == {None}
    other = select(task, manual, cache=cache, selector="random", like=best, seed=2)
    assert other.fingerprint != chosen.fingerprint
    everything = select(task, manual, cache=cache, selector="random", max_documents=10**9)
    assert sorted(everything.rows.tolist() + everything.leaks.tolist()) == list(range(len(manual)))
    by_words = select(task, manual, cache=cache, k=5, max_words=2_000)
    like_words = select(task, manual, cache=cache, selector="random", like=by_words)
    assert by_words.manifest["words"] - 200 < like_words.manifest["words"] <= by_words.manifest["words"]


def test_random_does_not_depend_on_the_engine_options(task, manual, cache):
    one, two = (select(task, manual, cache=cache, selector="random", max_documents=9, k=k) for k in (3, 4))
    assert one.folder == two.folder


def test_cached_by_all_that_makes_it(task, manual, cache, tmp_path):
    base = {"cache": tmp_path, "k": 3}
    first = select(task, manual, **base)
    stamp = (first.folder / "manifest.json").stat().st_mtime_ns
    assert select(task, manual, **base, threads=1).folder == first.folder
    assert (first.folder / "manifest.json").stat().st_mtime_ns == stamp
    changes = [
        {"k": 4}, {"max_documents": 5}, {"max_words": 500}, {"scoring": "atire"}, {"analyzer": "words"}, {"k1": 1.3},
        {"b": 0.5}, {"query_terms": 20}, {"selector": "random", "max_documents": 5},
    ]  # fmt: skip
    folders = {first.folder} | {select(task, manual, **(base | change)).folder for change in changes}
    train, dev, test = (task.texts(split) for split in ("train", "dev", "test"))
    for other in (make_task(train[1:], dev, test), make_task(train, dev[1:], test), make_task(train, dev, test[1:])):
        folders.add(select(other, manual, **base).folder)
    assert len(folders) == 1 + len(changes) + 3
    assert select(make_task(train, dev, test, name="renamed"), manual, **base).folder == first.folder

    (first.folder / "manifest.json").unlink()  # as after a crash
    (first.folder / "rows.npy").write_bytes(b"")
    again = select(task, manual, **base)
    assert as_tuples(again) == as_tuples(first)
    assert again.fingerprint == first.fingerprint


def test_reference_engine_selects_the_same(manual, real_text, tmp_path):
    task = make_task([" ".join(text.split()[:8]) for text in real_text[:100:25]])
    ours, theirs = (
        select(task, manual, cache=tmp_path, engine=engine, scoring="okapi", k=10) for engine in ("bm25", "rank_bm25")
    )
    assert set(ours.rows.tolist()) == set(theirs.rows.tolist())
    assert np.allclose(np.sort(ours.scores), np.sort(theirs.scores), rtol=1e-6)


def test_progress_names_each_phase(task, manual, tmp_path):
    seen = []
    select(task, manual, cache=tmp_path, k=3, progress=lambda *step: seen.append(step))
    assert list(dict.fromkeys(what for _, _, what in seen)) == ["indexing", "searching", "looking for leaks"]
    assert all(done <= total for done, total, _ in seen)


@pytest.mark.parametrize(("queries", "k"), [(1, 5000), (4999, 5000), (5000, 500), (100_000, 500), (100_001, 50)])
def test_k_of_the_paper(queries, k):
    assert paper_k(queries) == k


def test_k_comes_from_the_rule_unless_given(task, manual, cache):
    assert select(task, manual, cache=cache).manifest["options"]["k"] == 5000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"selector": "best"},
            "retrieval.selector=best is unknown; choose one of bm25, random, dsir, tfidf, embedding",
        ),
        ({"engine": "sphinx"}, "retrieval.engine=sphinx is unknown"),
        ({"analyzer": "french"}, "retrieval.analyzer=french is unknown"),
        ({"scoring": "bm26"}, "retrieval.scoring=bm26 is unknown"),
        ({"k": 0}, "retrieval.k=0 must be at least 1"),
        ({"max_documents": 0}, "retrieval.max_documents=0 must be at least 1"),
        ({"query_terms": 0}, "retrieval.query_terms=0 must be at least 1"),
        ({"b": 2.0}, "b from 0 to 1"),
        ({"selector": "random"}, "random wants a bound"),
        ({"max_words": 1}, "none is left"),
    ],
)
def test_bad_options_are_one_sentence_and_leave_no_selection(options, message, task, manual, tmp_path):
    with pytest.raises(InputError, match=message):
        select(task, manual, cache=tmp_path, **options)
    assert not list(tmp_path.glob("selections/*"))


def test_no_match_for_any_query(manual, tmp_path):
    with pytest.raises(InputError, match="no document of the corpus shares a term with any of the 2 training texts"):
        select(make_task(["qwzx", "the of"]), manual, cache=tmp_path)
    assert not list(tmp_path.glob("selections/*"))
    with pytest.raises(InputError, match="is not a selection"):
        Selection(tmp_path)


def test_tiny_task_finds_its_own_themes(tiny_task, tiny_corpus, tmp_path):
    """Half of the corpus is about the task's themes, half is Python's manual."""
    corpus = open_corpus(str(tiny_corpus), tmp_path)
    selection = select(read_task(str(tiny_task)), corpus, cache=tmp_path, k=5)
    themed = sum(int(record["id"][1:]) < 300 for record in selection.records())
    assert themed > 0.9 * len(selection)


def test_real_task_and_corpus_are_free_of_leaks(tlm_data, tmp_path):
    """The shared corpus was cleaned of all dev and test texts; the training texts were left in."""
    corpus = open_corpus(str(tlm_data / "corpus" / "general-06.jsonl.gz"), tmp_path)
    selection = select(read_task(str(tlm_data / "tlm" / "sciie")), corpus, cache=tmp_path, k=5)
    assert selection.manifest["leaks"]["in_corpus"] == 0
    assert selection.manifest["queries"]["without_hits"] == 0
    papers = selection.manifest["by_source"]["nlp_papers"]["documents"] / len(selection)
    assert papers > 4 * corpus.statistics["by_source"]["nlp_papers"]["documents"] / len(corpus)
