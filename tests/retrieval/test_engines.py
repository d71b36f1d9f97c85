import random
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_bm25 import as_pairs, slow_search

from retrieval.analyze import ANALYZERS
from retrieval.corpus import Corpus, Document, add_documents, build_corpus
from retrieval.engines import ENGINES
from retrieval.scoring import SCORINGS
from tasks.errors import InputError

EXACT = ("bm25", "scan", "rank_bm25")
ENGLISH, WORDS = ANALYZERS["english"], ANALYZERS["words"]
# Words in all documents, in few, beyond ASCII, and stop words; few enough that ties are everywhere.
DOCUMENT = st.lists(st.sampled_from(["all", "x", "y", "z", "é", "東", "the"]), max_size=6).map(
    lambda words: " ".join(["all", *words])
)
QUERY = st.lists(st.sampled_from(["all", "x", "y", "z", "é", "東", "the", "unknown"]), max_size=8)


def store(texts: list[str], folder: Path) -> Corpus:
    return build_corpus((Document(str(i), text) for i, text in enumerate(texts)), folder)


@pytest.fixture(scope="module")
def manual(real_text, tmp_path_factory) -> Corpus:
    return store(real_text, tmp_path_factory.mktemp("manual") / "store")


def texts_of(corpus: Corpus) -> list[str]:
    return [document.text for document in corpus]


@pytest.mark.parametrize("scoring", SCORINGS)
def test_bm25_equals_the_slow_twin_on_real_text(scoring, manual, tmp_path):
    analyzer = WORDS if scoring == "okapi" else ENGLISH
    texts = texts_of(manual)
    queries = [analyzer.terms(text) for text in texts[::60]]
    engine = ENGINES["bm25"](manual, analyzer, scoring, 1.2, 0.75, tmp_path, threads=1)
    for k in (7, 100):
        assert as_pairs(engine.search(queries, k)) == slow_search(texts, analyzer, scoring, 1.2, 0.75, queries, k)


def test_ties_go_to_the_earlier_row_also_at_the_last_place(tmp_path):
    rng = random.Random(0)
    words = [f"w{i}" for i in range(9)]
    texts = list(dict.fromkeys(" ".join(rng.sample(words, 9)) for _ in range(500)))  # the same terms in other orders
    engine = ENGINES["bm25"](store([*texts, "w0"], tmp_path / "c"), WORDS, "lucene", 1.2, 0.75, tmp_path, threads=1)
    for k in (1, 2, 64, 499):
        rows, scores = engine.search([words[:3], words[::-1]], k)
        assert rows[1].tolist() == list(range(k))
        assert len(set(scores[1].tolist())) == 1
        assert rows[0].tolist() == list(range(k))


@settings(max_examples=40, deadline=None)
@given(st.lists(DOCUMENT, min_size=1, max_size=12), st.lists(QUERY, max_size=4), st.data())
def test_bm25_equals_the_slow_twin_on_adversarial_corpora(texts, queries, data):
    scoring = data.draw(st.sampled_from(sorted(SCORINGS)))
    k1, b = data.draw(st.sampled_from([(1.2, 0.75), (0, 0), (0.5, 1), (3, 0)]))
    k = data.draw(st.integers(1, 14))
    with TemporaryDirectory() as folder:
        corpus = store(texts, Path(folder) / "store")
        engine = ENGINES["bm25"](corpus, ENGLISH, scoring, k1, b, Path(folder), threads=2)
        found = engine.search(queries, k)
        assert found.rows.shape == found.scores.shape == (len(queries), min(k, len(corpus)))
        assert (found.scores[found.rows < 0] == 0).all()
        assert as_pairs(found) == slow_search(texts_of(corpus), ENGLISH, scoring, k1, b, queries, k)


@pytest.mark.parametrize("scoring", ["okapi", "lucene", "robertson", "atire"])
def test_rank_bm25_agrees(scoring, manual, tmp_path):
    texts = texts_of(manual)
    queries = [WORDS.terms(text)[:12] for text in texts[:8]]  # the rank_bm25 package takes its time
    ours, theirs = (ENGINES[name](manual, WORDS, scoring, 1.5, 0.75, tmp_path, 1) for name in ("bm25", "rank_bm25"))
    all_of = len(texts)
    our, their = ours.search(queries, all_of), theirs.search(queries, all_of)
    assert ((our.rows >= 0).sum(axis=1) == (their.rows >= 0).sum(axis=1)).all()
    for our_rows, our_scores, rows, scores in zip(*our, *their, strict=True):
        mine, package = np.zeros(all_of + 1), np.zeros(all_of + 1)  # the last place takes what is no hit
        mine[our_rows], package[rows] = our_scores, scores
        assert np.abs(mine - package).max() <= 1e-6 * package.max()


def test_number_of_threads_changes_nothing(manual, tmp_path):
    queries = [ENGLISH.terms(text) for text in texts_of(manual)[:300]]
    engines = (ENGINES["bm25"](manual, ENGLISH, "lucene", 1.2, 0.75, tmp_path, threads) for threads in (1, 3))
    one, three = (engine.search(queries, 20) for engine in engines)
    assert np.array_equal(one.rows, three.rows)
    assert np.array_equal(one.scores, three.scores)


@pytest.mark.parametrize("name", EXACT)
def test_explanation_adds_up_to_the_score(name, manual, tmp_path):
    query = [*ENGLISH.terms(manual[40].text), "class", "class", "unknownword"]
    engine = ENGINES[name](manual, ENGLISH, "lucene", 1.2, 0.75, tmp_path, 1)
    rows, scores = engine.search([query], 5)
    for row, score in zip(rows[0], scores[0], strict=True):
        explained = engine.explain(query, int(row))
        assert set(explained) <= set(query)
        assert sum(explained.values()) == pytest.approx(score, rel=1e-12)


@pytest.mark.parametrize("name", EXACT)
def test_more_hits_than_documents_unknown_terms_and_no_query(name, tmp_path):
    corpus = store(["alpha beta", "alpha", "gamma", "delta", "epsilon"], tmp_path / "store")
    engine = ENGINES[name](corpus, WORDS, "atire", 1.2, 0.75, tmp_path, 1)
    rows, scores = engine.search([["alpha"], ["unknown"], []], 100)
    assert rows.tolist() == [[1, 0, -1, -1, -1], [-1] * 5, [-1] * 5]
    assert (scores[0, :2] > 0).all()
    assert (scores[rows < 0] == 0).all()
    assert engine.search([], 3).rows.shape == (0, 3)


def test_documents_without_terms_count_for_the_average_but_are_no_hits(tmp_path):
    corpus = store(["the of", "alpha", "the alpha beta"], tmp_path / "store")
    engine = ENGINES["bm25"](corpus, ENGLISH, "lucene", 1.2, 0.75, tmp_path, 1)
    assert as_pairs(engine.search([["alpha"]], 3)) == slow_search(
        texts_of(corpus), ENGLISH, "lucene", 1.2, 0.75, [["alpha"]], 3
    )
    empty = store(["the of", "a"], tmp_path / "empty")
    engine = ENGINES["bm25"](empty, ENGLISH, "lucene", 1.2, 0.75, tmp_path, 1)
    assert (engine.search([["the"], ["alpha"]], 3).rows == -1).all()


def test_very_long_query_counts_repeats(manual, tmp_path):
    query = [term for text in texts_of(manual)[:400] for term in ENGLISH.terms(text)][:10_000]
    engine = ENGINES["bm25"](manual, ENGLISH, "lucene", 1.2, 0.75, tmp_path, 1)
    found = as_pairs(engine.search([query], 50))
    assert found == slow_search(texts_of(manual), ENGLISH, "lucene", 1.2, 0.75, [query], 50)
    assert found != as_pairs(engine.search([list(dict.fromkeys(query))], 50))


def test_index_is_kept_and_serves_every_scoring(manual, tmp_path):
    open_engine = ENGINES["bm25"]
    first = open_engine(manual, ENGLISH, "lucene", 1.2, 0.75, tmp_path, 1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for scoring, k1, b in (("lucene", 1.2, 0.75), ("okapi", 1.2, 0.75), ("lucene", 0.3, 0.7)):
        assert open_engine(manual, ENGLISH, scoring, k1, b, tmp_path, 2).folder == first.folder
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert open_engine(manual, WORDS, "lucene", 1.2, 0.75, tmp_path, 1).folder != first.folder
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("scoring", ["lucene", "okapi"])
def test_how_a_corpus_is_cut_changes_nothing(scoring, manual, tmp_path):
    queries = [ENGLISH.terms(text) for text in texts_of(manual)[::40]]
    found = []
    for memory in (1 << 30, 1 << 20):
        engine = ENGINES["bm25"](manual, ENGLISH, scoring, 1.2, 0.75, tmp_path / str(memory), 2, memory=memory)
        found.append((len(engine.shards), engine.search(queries, 30), engine.explain(queries[0], len(manual) - 9)))
    (one, whole, explained), (many, cut, explained_cut) = found
    assert one == 1
    assert many > 5
    assert np.array_equal(whole.rows, cut.rows)
    assert np.array_equal(whole.scores, cut.scores)
    assert explained == explained_cut


def test_more_documents_reuse_the_shards_that_are_there(real_text, tmp_path):
    half, whole = store(real_text[: len(real_text) * 2 // 3], tmp_path / "half"), store(real_text, tmp_path / "whole")
    memory = 1 << 20
    ENGINES["bm25"](half, ENGLISH, "lucene", 1.2, 0.75, tmp_path / "index", 1, memory=memory)
    before = {path.name for path in (tmp_path / "index").iterdir()}
    engine = ENGINES["bm25"](whole, ENGLISH, "lucene", 1.2, 0.75, tmp_path / "index", 1, memory=memory)
    again = [shard.folder.name in before for shard in engine.shards]
    assert again.count(True) >= len(before) - 2 > 1  # all but the index's manifest and the last, shorter shard
    queries = [ENGLISH.terms(text) for text in real_text[::100]]
    assert as_pairs(engine.search(queries, 9)) == slow_search(texts_of(whole), ENGLISH, "lucene", 1.2, 0.75, queries, 9)


@pytest.mark.parametrize("scoring", ["lucene", "okapi"])
def test_an_index_that_was_extended_scores_as_one_that_was_built(scoring, real_text, tmp_path):
    documents = [Document(str(i), text) for i, text in enumerate(real_text)]
    queries = [ENGLISH.terms(text) for text in real_text[::60]]
    whole = build_corpus(documents, tmp_path / "whole")
    fresh = ENGINES["bm25"](whole, ENGLISH, scoring, 1.2, 0.75, tmp_path / "fresh", 1)
    store, before, done = tmp_path / "store", set(), 900
    build_corpus(documents[:900], store)
    for last, memory in ((900, 1 << 20), (1100, 1 << 30), (1110, 1 << 30), (len(documents), 1 << 30)):
        corpus = add_documents(documents[done:last], store)
        engine = ENGINES["bm25"](corpus, ENGLISH, scoring, 1.2, 0.75, tmp_path / "index", 1, memory=memory)
        names = [shard.folder.name for shard in engine.shards]
        assert before <= set(names) or last == len(documents)  # whatever the memory is now
        before, done = set(names), last
    assert len(names) > 3
    assert engine.shards[-1].documents > 500  # what was added before, joined with what is larger
    for ours, theirs in zip(engine.search(queries, 30), fresh.search(queries, 30), strict=True):
        assert np.array_equal(ours, theirs)
    assert engine.explain(queries[3], 1105) == fresh.explain(queries[3], 1105)


def test_a_guess_from_a_sample_that_misleads_changes_nothing(tmp_path):
    """Every 16th document, which the sample takes, is far better than all others."""
    texts = [f"alpha alpha alpha n{i}" if i % 16 == 0 else f"alpha beta{i % 7} gamma n{i}" for i in range(40_000)]
    corpus = store(texts, tmp_path / "store")
    queries = [["alpha"], ["alpha", "gamma", "beta3"], ["n5"], ["gamma"]]
    for k in (100, 4000):
        engine = ENGINES["bm25"](corpus, WORDS, "lucene", 1.2, 0.75, tmp_path / "index", 2)
        assert as_pairs(engine.search(queries, k)) == slow_search(texts, WORDS, "lucene", 1.2, 0.75, queries, k)


@pytest.mark.parametrize("file", ["postings.bin", "starts.npy", "df.npy", "term_letters.npy"])
def test_truncated_index_is_an_error_that_says_what_to_do(file, manual, tmp_path):
    folder = ENGINES["bm25"](manual, ENGLISH, "lucene", 1.2, 0.75, tmp_path, 1).shards[0].folder
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=rf"{file} has \d+ bytes instead of \d+; delete .* and it is made again"):
        ENGINES["bm25"](manual, ENGLISH, "lucene", 1.2, 0.75, tmp_path, 1)


def test_a_shard_without_manifest_is_built_again_alone(manual, tmp_path):
    arguments = (manual, ENGLISH, "lucene", 1.2, 0.75, tmp_path, 1)
    engine = ENGINES["bm25"](*arguments, memory=1 << 20)
    folder = engine.shards[2].folder
    postings = (folder / "postings.bin").read_bytes()
    (folder / "manifest.json").unlink()
    (folder / "postings.bin").write_bytes(b"half")
    times = {shard.folder: shard.folder.stat().st_mtime_ns for shard in engine.shards if shard.folder != folder}
    ENGINES["bm25"](*arguments, memory=1 << 20)
    assert (folder / "postings.bin").read_bytes() == postings
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.parametrize(("k1", "b"), [(-0.1, 0.75), (1.2, -0.1), (1.2, 1.1)])
def test_impossible_parameters(k1, b, manual, tmp_path):
    with pytest.raises(InputError, match="wants k1 of at least 0 and b from 0 to 1"):
        ENGINES["bm25"](manual, ENGLISH, "lucene", k1, b, tmp_path, 1)
    assert not list(tmp_path.iterdir())


def test_rank_bm25_refuses_what_it_would_do_wrongly(manual, tmp_path):
    with pytest.raises(InputError, match="does not know the scoring bm25l"):
        ENGINES["rank_bm25"](manual, ENGLISH, "bm25l", 1.2, 0.75, tmp_path, 1)
