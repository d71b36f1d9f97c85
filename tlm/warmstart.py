"""Token embeddings before the first step: the PPMI matrix of the text's co-occurrence counts, factorised.

Counting and one factorisation take seconds and tell a model which tokens keep the same company, which masked-LM
training from a random start learns only after millions of tokens. It is still training from scratch: nothing is used
but the run's own text, and the cost is in the ledger.

A V x V matrix is held dense (6 V^2 bytes at the peak: 0.4 GB at 8k tokens, 1.6 GB at 16k): 14% of the PPMI entries are
not zero, and at that density a dense product takes little more than half the time of a sparse one, on one thread.

The choices were made by a linear classifier on mean embeddings (dimension 128, 20M tokens counted; ag_news, bbc_news,
imdb and chemprot, dev): window 5, like 10; 2 and 32 lose a point or two on one task each, 1/distance weights half a
point; contexts smoothed by 0.75, with which a shift of log 3 loses 2 points; half of the singular values' weight on the
words (0.25 and 0.75 are alike); no component removed; context vectors not added (they lose 1.6 points).
"""

import itertools
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numba
import numpy as np

from tlm.tokenizer import MASK

if TYPE_CHECKING:  # torch is not needed to count
    from tlm.model import Transformer

VERSION = 2  # part of the cache key
# Of the rows' entries. At 0.02 Adam (2e-3) wipes the start out: bbc_news, 10 texts a class, 120 joint steps, dev
# macro-F1 of 2 seeds 75; at 0.1 84, from a random start 72. From 0.08 to 0.16 all is alike.
STD = 0.1
WINDOW = 5  # tokens to either side
SMOOTHING = 0.75  # of the contexts' frequencies, as in word2vec's negative sampling
POWER = 0.5  # of the singular values
OVERSAMPLES, ITERATIONS = 16, 3  # of the randomized SVD: one iteration loses a point, seven gain nothing
LARGEST_LOGIT = 14.0  # best untrained masked-LM loss at hidden 128 and 256
CONSTANT = 0.3  # of an embedding's length, alike for all tokens: what attention by place is made of
SHARPNESS = 32.0  # logit of the place that a head looks at; 16: loss of 5.20, 32: 5.15 (as below, 30% masked)
# What the heads of the first layers look at, by turns: (offset in tokens, width). A layer adds the mean of it.
PLACES = (((-1, 0.7), (1, 0.7)), ((0, 4.0),))
RANDOM_SHARE = 0.2  # content of tokens that were never seen: as little as the most frequent words have

Texts = tuple[np.ndarray, np.ndarray]  # (token ids of all texts end to end, offsets int64[texts + 1])


class Start(NamedTuple):
    """`embeddings` float32[V, dimension]; `log_frequencies` float32[V], a start for the MLM output bias."""

    embeddings: np.ndarray
    log_frequencies: np.ndarray


def cached_start(
    cache: Path, key: str, stores: Sequence[Texts], vocabulary: int, dimension: int, std: float = STD
) -> Start:
    """Both from one pass over `stores`, kept in `cache`. `key` names the texts and the tokenizer; on a hit `stores` are
    not read.
    """
    settings = (VERSION, WINDOW, SMOOTHING, POWER, OVERSAMPLES, ITERATIONS, RANDOM_SHARE, vocabulary, dimension, std)
    path = cache / f"start-{sha256(f'{settings}/{key}'.encode()).hexdigest()[:16]}.npz"
    if not path.exists():
        pairs, frequencies = count(stores, vocabulary)
        start = Start(embeddings(pairs, dimension, std), log_frequencies(frequencies))
        cache.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            np.savez(file, **start._asdict())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    with np.load(path) as arrays:
        return Start(arrays["embeddings"], arrays["log_frequencies"])


def count(stores: Sequence[Texts], vocabulary: int, window: int = WINDOW) -> tuple[np.ndarray, np.ndarray]:
    """How often two tokens stand at most `window` places apart in a text: float32[V, V], symmetric; and how often each
    token stands anywhere: int64[V].

    A token's own repetition counts in both directions, like any pair. Special tokens hold their place but are in no
    pair. One pass, integers, so the result does not depend on any order.
    """
    triangle = np.zeros(vocabulary * (vocabulary + 1) // 2, np.uint32)  # float32 would stop counting at 2^24
    frequencies = np.zeros(vocabulary, np.int64)
    for tokens, offsets in stores:
        _count(np.asarray(tokens), np.asarray(offsets), window, MASK + 1, triangle, frequencies)
    return _square(triangle, vocabulary), frequencies


@numba.njit(cache=True)
def _count(tokens, offsets, window, ordinary, triangle, frequencies):
    for text in range(len(offsets) - 1):
        begin = offsets[text]
        for i in range(begin, offsets[text + 1]):
            a = np.int64(tokens[i])
            frequencies[a] += 1
            if a < ordinary:
                continue
            for j in range(max(begin, i - window), i):
                b = np.int64(tokens[j])
                if b >= ordinary:
                    low, high = min(a, b), max(a, b)
                    triangle[high * (high + 1) // 2 + low] += 1


def _square(triangle: np.ndarray, vocabulary: int, block: int = 64) -> np.ndarray:
    """The lower triangle, row after row, as a symmetric float32[V, V] with the diagonal doubled."""
    square = np.empty((vocabulary, vocabulary), np.float32)
    for row in range(vocabulary):
        square[row, : row + 1] = triangle[row * (row + 1) // 2 :][: row + 1]
    for low in range(0, vocabulary, block):  # block by block, as a transpose of the whole misses the cache
        columns = slice(low, low + block)
        square[columns, columns] = np.tril(square[columns, columns]) + np.tril(square[columns, columns], -1).T
        for high in range(low + block, vocabulary, block):
            square[columns, high : high + block] = square[high : high + block, columns].T
    square[np.diag_indices(vocabulary)] *= 2
    return square


def log_frequencies(frequencies: np.ndarray) -> np.ndarray:
    """log of (count + 1) / (sum of these): float32[V]. As the bias of the masked-LM output layer it saves the model the
    first nats: after 150 steps of 2,048 tokens the loss was 6.75 with it and 6.92 without.
    """
    smoothed = frequencies + 1.0
    return np.log(smoothed / smoothed.sum()).astype(np.float32)


def ppmi(counts: np.ndarray, smoothing: float = SMOOTHING) -> np.ndarray:
    """max(0, log(P(w, c) / (P(w) P'(c)))), P'(c) in proportion to #(c)^smoothing: float32[V, V]; Overwrites `counts`.

    Positive pointwise mutual information; what skip-gram factorises implicitly is PMI (Levy and Goldberg 2014, Neural
    word embedding as implicit matrix factorization), the smoothing is from Levy, Goldberg and Dagan 2015, section 3.1.
    """
    words = counts.sum(1, dtype=np.float64)
    contexts = words**smoothing
    with np.errstate(divide="ignore", invalid="ignore"):
        log_words, log_contexts = np.log(words), np.log(contexts / contexts.sum())
        out = np.log(counts, out=counts)
    log_words[words == 0] = log_contexts[words == 0] = 0  # their counts are zero, and log 0 is low enough
    out -= log_words.astype(np.float32)[:, None]  # log #(w, c) - log #(w) - log P'(c): the corpus's size cancels
    out -= log_contexts.astype(np.float32)
    return np.maximum(out, 0, out=out)


def factors(matrix: np.ndarray, dimension: int, power: float = POWER) -> np.ndarray:
    """U S^power of the `dimension` largest singular values: float32[rows, dimension].

    Randomized SVD (Halko, Martinsson and Tropp 2011). The largest entry of each column is positive; bit-identical for
    the same number of BLAS threads.
    """
    from sklearn.utils.extmath import randomized_svd

    u, s, _ = randomized_svd(
        matrix, dimension, n_oversamples=OVERSAMPLES, n_iter=ITERATIONS, random_state=0, flip_sign=False
    )
    u *= np.sign(u[np.abs(u).argmax(0), np.arange(u.shape[1])])
    return (u * s**power).astype(np.float32)


def embeddings(counts: np.ndarray, dimension: int, std: float = STD) -> np.ndarray:
    """Rows for a model's embedding: float32[V, dimension], each of length std * sqrt(dimension). Overwrites `counts`.

    How long a token's vector is tells how much it says ("the" 0.4, "film" 1.6, "football" 2.0), but a model's first
    norm takes lengths away. So length becomes direction: one coordinate is the same for all tokens, and holds what a
    row's own part leaves of the common length. After the norm this gains a classifier on mean embeddings 1.3 points.

    Tokens that were never counted, the special ones among them, get a random part of share RANDOM_SHARE.
    """
    vocabulary = len(counts)
    seen = counts.any(1)
    content = np.zeros((vocabulary, dimension - 2), np.float32)
    rank = min(dimension - 2, vocabulary)
    content[:, :rank] = factors(ppmi(counts), rank)
    content[~seen] = np.random.default_rng(0).standard_normal(((~seen).sum(), dimension - 2), np.float32)
    length = np.linalg.norm(content, axis=1)
    longest = np.quantile(length[seen], 0.95) if seen.any() else 1.0
    share = np.where(seen, np.minimum(length / longest, 1), RANDOM_SHARE)
    rows = np.empty((vocabulary, dimension), np.float32)
    rows[:, :-2] = content * (share / np.maximum(length, 1e-12))[:, None]
    rows[:, -2] = np.sqrt(1 - share**2)
    rows[:, :-1] *= np.sqrt(1 - CONSTANT**2)
    rows[:, -1] = CONSTANT
    return rows * np.float32(std * np.sqrt(dimension))


def predict_from_context(model: "Transformer", start: Start) -> None:
    """Make the untrained `model` a continuous bag of words (CBOW, Mikolov et al. 2013) of the embeddings in `start`.

    The first layer's attention adds the mean of the tokens about each one's neighbours, the second's that of its
    surroundings (PLACES); the masked-LM head passes it on; the output layer, whose rows are the embeddings, compares it
    with every token; the bias holds the log frequencies. The architecture is the same, these are weights like any
    other. With V = 8k the masked-LM loss begins at 6.4 instead of 9.0. On held-out passages for sciie, after 400 steps
    of 512 tokens (hidden 128, 15% masked), it is 5.43 to 5.46 with heads that look at the neighbours in the first
    layer, whatever the second begins with, and 5.59 where the first takes the mean of the whole text.
    """
    import torch

    hidden, heads = model.shape.hidden, model.shape.heads
    own = torch.eye(hidden)
    own[-2:] = 0  # the coordinates that tell nothing of a token
    scale = float(np.linalg.norm(start.embeddings, axis=1).mean()) * hidden**0.5  # largest logit of a normed state
    with torch.no_grad():
        model.model.embeddings.tok_embeddings.weight.copy_(torch.from_numpy(start.embeddings))
        model.decoder.bias.copy_(torch.from_numpy(start.log_frequencies))
        for layer, places in zip(model.model.layers, PLACES, strict=False):
            query, key, value = layer.attn.Wqkv.weight.chunk(3)
            for one, (offset, width) in zip(range(heads), itertools.cycle(places), strict=False):
                rows = slice(one * hidden // heads, (one + 1) * hidden // heads)
                by_place = look_at(offset, width, hidden // heads, model.shape.rope_theta)
                for part, column in zip((query, key), by_place, strict=True):
                    part[rows] *= 0.3
                    part[rows, -1] = torch.from_numpy(column) / (CONSTANT * hidden**0.5)
            value.copy_(own)
            layer.attn.Wo.weight.copy_(torch.eye(hidden))
        model.mlm_head.dense.weight.copy_(0.2 * own)  # small enough for gelu to be nearly linear; the norm undoes it
        model.mlm_head.norm.weight.fill_(LARGEST_LOGIT / scale)


def look_at(offset: float, width: float, dimension: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """A query and a key, each float32[dimension], which RoPE turns into a logit that depends on the tokens' distance
    alone, and is largest, SHARPNESS, where the key stands `offset` after the query.

    The logit at distance d is SHARPNESS x sum of weight_f cos(frequency_f (d - offset)): frequencies that turn within
    less than `width` tokens weigh little.
    """
    frequencies = theta ** -(np.arange(0, dimension, 2) / dimension)
    weights = np.exp(-0.5 * (frequencies * width) ** 2)
    lengths = np.sqrt(SHARPNESS * weights / weights.sum() * dimension**0.5)
    query = np.concatenate([lengths * np.cos(frequencies * offset), lengths * np.sin(frequencies * offset)])
    return query.astype(np.float32), np.concatenate([lengths, 0 * lengths]).astype(np.float32)


def flops(vocabulary: int, dimension: int, tokens: int) -> int:
    """Of `embeddings(count(...))` on so many tokens: the additions of counting, the PPMI, and the SVD's products.

    The SVD multiplies the V x V matrix with V x k (k = dimension + oversamples) twice an iteration and twice around
    them; between the products it factorises V x k (LU, 2 V k^2), at the end it does QR and a small SVD (14 V k^2).
    """
    k = dimension - 2 + OVERSAMPLES
    products = (2 * ITERATIONS + 2) * 2 * vocabulary**2 * k
    panels = (2 * ITERATIONS * 2 + 4 + 14 + 2) * vocabulary * k**2
    return WINDOW * tokens + 5 * vocabulary**2 + products + panels
