import inspect
import itertools
import math
import re

import networkx
import numpy as np
import pytest
from conftest import THEMES, themed_text

from tlm import warmstart
from tlm.attention import angles, rotated
from tlm.tokenizer import MASK, Encoder, train_tokenizer
from tlm.warmstart import (
    Start,
    cached_start,
    count,
    embeddings,
    factors,
    flops,
    log_frequencies,
    look_at,
    ppmi,
    predict_from_context,
)


def texts_of(rows: list[list[int]], dtype=np.uint16):
    return np.array([i for row in rows for i in row], dtype), np.cumsum([0, *map(len, rows)])


def slow_count(rows, vocabulary, window):
    counts = np.zeros((vocabulary, vocabulary))
    for row in rows:
        for i, j in itertools.permutations(range(len(row)), 2):
            if abs(i - j) <= window and min(row[i], row[j]) > MASK:
                counts[row[i], row[j]] += 1
    return counts


@pytest.mark.parametrize("window", [1, 5, 40])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_counts_equal_a_double_loop(window, dtype):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 12, size).tolist() for size in (30, 0, 1, 2, 17)]
    expected = slow_count(rows, 12, window)
    counts, frequencies = count([texts_of(rows[:2], dtype), texts_of(rows[2:], dtype)], 12, window)
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_array_equal(counts, counts.T)
    assert counts.dtype == np.float32
    assert counts[: MASK + 1].sum() == 0 < counts.sum()
    assert frequencies.tolist() == [sum(row.count(token) for row in rows) for token in range(12)]


@pytest.mark.parametrize("size", [1, 255, 256, 257, 700])
def test_a_triangle_becomes_a_square(size):
    triangle = np.random.default_rng(0).integers(0, 9, size * (size + 1) // 2).astype(np.uint32)
    expected = np.zeros((size, size))
    expected[np.tril_indices(size)] = triangle
    np.testing.assert_array_equal(warmstart._square(triangle, size), expected + expected.T)


def test_log_frequencies_sum_to_one():
    logs = log_frequencies(np.array([0, 3, 0, 7]))
    np.testing.assert_allclose(np.exp(logs), [1 / 14, 4 / 14, 1 / 14, 8 / 14], rtol=1e-6)


def test_counts_go_on_past_what_float32_can_hold():
    tokens = np.full(2**24 + 3, 5, np.uint16)
    counts, frequencies = count([(tokens, np.array([0, len(tokens)]))], 6, window=1)
    assert frequencies[5] == len(tokens)
    assert counts[5, 5] == np.float32(2 * (2**24 + 2)) > 2**25


def test_ppmi_is_the_formula():
    """Four words, by hand: P(w, c) = #(w, c) / N, P'(c) = #(c)^0.75 / sum of all #(c)^0.75."""
    counts = np.array([[0, 8, 1, 0], [8, 2, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]], np.float64)
    total, words = 22, [9, 11, 2, 0]
    smooth = [w**0.75 for w in words]
    expected = np.zeros((4, 4))
    for w, c in itertools.product(range(4), repeat=2):
        if counts[w, c]:
            joint, word, context = counts[w, c] / total, words[w] / total, smooth[c] / sum(smooth)
            expected[w, c] = max(0, math.log(joint / (word * context)))
    result = ppmi(counts.astype(np.float32))
    np.testing.assert_allclose(result, expected, atol=1e-6)
    assert expected[0, 1] > 0
    assert expected[1, 1] == 0


def test_factors_are_those_of_the_exact_svd():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(80, 12)) @ rng.normal(size=(12, 80)) + 0.001 * rng.normal(size=(80, 80))
    matrix = matrix.astype(np.float32)
    u, s, vt = np.linalg.svd(matrix.astype(np.float64))
    left, weighted = factors(matrix, 12, power=0), factors(matrix, 12, power=1)
    np.testing.assert_allclose(np.abs((left * u[:, :12]).sum(0)), 1, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(weighted, axis=0), s[:12], rtol=1e-4)
    np.testing.assert_allclose(left @ (left.T @ matrix), (u[:, :12] * s[:12]) @ vt[:12], atol=1e-2)
    np.testing.assert_allclose(factors(matrix, 12), left * np.sqrt(s[:12]), atol=1e-3)
    assert (left[np.abs(left).argmax(0), np.arange(12)] > 0).all()


def test_rows_have_the_models_length_and_say_less_for_frequent_words():
    rng = np.random.default_rng(0)
    rows = [(5 + (rng.random(20) ** 3 * 44)).astype(int).tolist() for _ in range(400)]
    start = embeddings(count([texts_of(rows)], 60)[0], 16, std=0.05)
    assert start.shape == (60, 16)
    assert start.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(start, axis=1), 0.05 * 4, rtol=1e-5)
    np.testing.assert_allclose(start[:, -1], 0.2 * warmstart.CONSTANT, rtol=1e-5)
    assert (start[:, -2] >= 0).all()
    content = np.linalg.norm(start[:, :-2], axis=1) / 0.2 / (1 - warmstart.CONSTANT**2) ** 0.5
    assert content[5] < 0.5 < content[40:48].mean()  # 5 is the most frequent
    np.testing.assert_allclose(content[: MASK + 1], warmstart.RANDOM_SHARE, rtol=1e-4)
    np.testing.assert_allclose(content[50:], warmstart.RANDOM_SHARE, rtol=1e-4)
    assert len(np.unique(start[[0, 1, 2, 3, 4, *range(50, 60)], 0])) == 15


def test_related_words_are_nearer_than_unrelated_ones(real_text):
    """Made-up sentences of three themes: a word's nearest neighbours among all theme words are of its own theme."""
    import random

    rng = random.Random(3)
    texts = [themed_text(theme, rng, 30) for theme in sorted(THEMES) for _ in range(300)] + real_text[:200]
    tokenizer = train_tokenizer(texts, 1200)
    start = embeddings(count([store(tokenizer, texts)], tokenizer.get_vocab_size())[0], 32)
    themes = [theme for theme in THEMES for _ in THEMES[theme]]
    ids = [tokenizer.token_to_id(word) for theme in THEMES for word in THEMES[theme]]
    assert None not in ids
    near = cosine(start, ids)
    hits = [themes[i] == themes[j] for i in range(len(ids)) for j in near[i].argsort()[-10:-1]]
    assert np.mean(hits) > 0.7  # 0.31 by chance


def docstrings(module):
    paragraphs = [
        p for name in sorted(dir(module)) for p in (inspect.getdoc(getattr(module, name)) or "").split("\n\n")
    ]
    return [text for text in dict.fromkeys(" ".join(p.split()) for p in paragraphs) if len(text.split()) >= 8]


def test_related_words_of_real_english_are_nearer(real_text):
    """The manual alone is too little: from one Python to the next `tuple` stands nearer to `sequence` than 95 or 97 of
    100 words do; with the docstrings of a package that torch brings, than 98."""
    texts = [*real_text, *docstrings(networkx)]
    tokenizer = train_tokenizer(texts, 2500)
    start = embeddings(count([store(tokenizer, texts)], tokenizer.get_vocab_size())[0], 65)  # 63 of content
    pairs = [("int", "float"), ("list", "tuple"), ("bytes", "string"), ("import", "module"), ("tuple", "sequence")]
    ids = {word: tokenizer.token_to_id(word) for pair in pairs for word in pair}
    near = cosine(start, list(range(len(start))))
    for a, b in pairs:
        assert (near[ids[a]] < near[ids[a], ids[b]]).mean() > 0.97, (a, b)


def test_the_same_texts_give_the_same_bits_and_the_cache_is_by_key(real_text, tmp_path):
    tokenizer = train_tokenizer(real_text[:300], 900)
    stores = [store(tokenizer, real_text[:300])]
    first = cached_start(tmp_path, "key", stores, 900, 24)
    pairs, frequencies = count(stores, 900)
    np.testing.assert_array_equal(first.embeddings, embeddings(pairs, 24))
    np.testing.assert_array_equal(first.log_frequencies, log_frequencies(frequencies))
    again = cached_start(tmp_path, "key", [], 900, 24)
    np.testing.assert_array_equal(first.embeddings, again.embeddings)
    np.testing.assert_array_equal(first.log_frequencies, again.log_frequencies)
    assert cached_start(tmp_path, "key", stores, 900, 12).embeddings.shape == (900, 12)
    other = cached_start(tmp_path, "other", [texts_of([])], 900, 24).embeddings
    assert not np.array_equal(first.embeddings, other)
    assert np.isfinite(other).all()  # no text at all: a random start
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 3
    assert all(re.fullmatch(r"start-[0-9a-f]{16}\.npz", name) for name in names)


def test_more_dimensions_than_tokens():
    start = embeddings(count([texts_of([[5, 6, 7, 8] * 5])], 9)[0], 64)
    assert start.shape == (9, 64)
    assert np.isfinite(start).all()


def test_flops_are_mostly_the_products():
    assert flops(8192, 128, 0) == pytest.approx(8 * 2 * 8192**2 * 142, rel=0.05)
    assert flops(8192, 128, 10**6) - flops(8192, 128, 0) == 5 * 10**6


@pytest.mark.parametrize(("offset", "width"), [(-1, 0.7), (1, 0.7), (0, 4.0), (3, 1.5)])
def test_a_head_looks_at_a_place(offset, width):
    """Through the model's own rotation: the logit depends on the distance alone and is largest at the offset."""
    import torch

    query, key = (torch.from_numpy(x).expand(40, 1, 32).contiguous() for x in look_at(offset, width, 32, 10_000.0))
    turned = [rotated(x, *angles(torch.arange(40), 32, 10_000.0, torch.float32))[:, 0] for x in (query, key)]
    logits = (turned[0] @ turned[1].T / 32**0.5).numpy()
    for distance in (-5, -1, 0, 2, 7):
        np.testing.assert_allclose(np.diagonal(logits, distance), logits[20, 20 + distance], rtol=1e-3, atol=1e-3)
    assert logits[20].argmax() == 20 + offset
    assert logits[20].max() == pytest.approx(warmstart.SHARPNESS, rel=1e-4)
    shares = torch.softmax(torch.from_numpy(logits[20]), 0)
    near = shares[20 + offset - 5 : 20 + offset + 6].sum()
    assert near > 0.8


def test_the_untrained_model_predicts_from_context(real_text):
    """Held-out real English: the start must beat the best that can be done without looking, unigram frequencies."""
    import torch
    from torch.nn import functional as F

    from tlm.batches import pack
    from tlm.model import ModelShape, Transformer
    from tlm.objectives import Masking

    tokenizer = train_tokenizer(real_text, 1500)
    vocabulary = tokenizer.get_vocab_size()
    pairs, frequencies = count([store(tokenizer, real_text[100:])], vocabulary)
    start = Start(embeddings(pairs, 64), log_frequencies(frequencies))
    shape = ModelShape(vocabulary, hidden=64, layers=2, heads=2, intermediate=64, max_length=128, num_labels=2)
    model = Transformer(shape, torch.Generator().manual_seed(0))
    names = {name: weight.clone() for name, weight in model.named_parameters()}

    masking = Masking(0.15, vocabulary, MASK + 1, MASK, seed=0)
    ids, offsets = store(tokenizer, real_text[:100])
    texts = [ids[a:b][:120] for a, b in itertools.pairwise(offsets)]
    batch = pack(*zip(*(masking(text, "held out", i) for i, text in enumerate(texts)), strict=True))

    def loss() -> float:
        with torch.no_grad():
            return F.cross_entropy(model.mlm_logits(model(batch)[batch.masked]), batch.masked_tokens).item()

    untrained = loss()
    unigram = -start.log_frequencies[batch.masked_tokens].mean()
    predict_from_context(model, start)
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, names[name])}
    assert len(changed) == 8
    assert loss() < unigram - 0.15 < untrained - 0.5


def store(tokenizer, texts):
    ids, lengths = Encoder(tokenizer)(texts)
    return ids, np.concatenate([[0], np.cumsum(lengths)])


def cosine(start, ids):
    rows = start[ids] - start[ids].mean(0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T
