import random
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval import leak
from retrieval.corpus import Corpus, Document, build_corpus
from retrieval.leak import find_leaks

TOKENS = [f"t{i}" for i in range(30)]


def store(texts: list[str], folder: Path) -> Corpus:
    return build_corpus((Document(f"d{i}", text) for i, text in enumerate(texts)), folder)


def slow_tokens(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", "".join(chr(ord(c) + 32) if "A" <= c <= "Z" else c for c in text))


def slow_leaks(documents: list[str], texts: list[str]) -> list[int]:
    """The rule itself: the runs of 13 tokens, and texts of 8 to 12 tokens as they are."""
    runs = set()
    for tokens in map(slow_tokens, texts):
        if len(tokens) >= 8:
            runs |= {tuple(tokens[i : i + 13]) for i in range(max(1, len(tokens) - 12))}
    found = []
    for row, tokens in enumerate(map(slow_tokens, documents)):
        windows = (tuple(tokens[i : i + n]) for n in range(8, 14) for i in range(len(tokens) - n + 1))
        if any(window in runs for window in windows):
            found.append(row)
    return found


def check(documents: list[str], texts: list[str], folder: Path) -> list[int]:
    corpus = store(documents, folder / "store")
    documents = [document.text for document in corpus]
    leaks = find_leaks(corpus, texts, folder, threads=2)
    assert leaks.rows.tolist() == slow_leaks(documents, texts)
    for row, example in zip(leaks.rows, leaks.examples, strict=True):
        assert example["row"] == row
        assert example["id"] == corpus[row].id
        shared = f" {example['shared']} "
        assert shared in f" {' '.join(slow_tokens(documents[row]))} "
        assert shared in f" {' '.join(slow_tokens(texts[example['text']]))} "
    return leaks.rows.tolist()


def test_the_rule(tmp_path):
    long, short, tiny = " ".join(TOKENS[:20]), " ".join(TOKENS[20:28]), "only seven tokens are in this text"
    documents = [
        " ".join(TOKENS[3:15]),  # 12 tokens of the long text: no
        " ".join(TOKENS[3:16]),  # 13: yes
        "before it, " + "; ".join(TOKENS[3:16]).upper() + "! after",  # marks and capitals do not matter
        " ".join([*TOKENS[3:10], "x", *TOKENS[10:20]]),  # broken in the middle: no
        "whole short: " + short,  # a text of 8 tokens: yes
        " ".join(TOKENS[20:27]),  # 7 of its tokens: no
        "t20 t21 t22 t23 t24 t25 t26 t277",  # its last token goes on: no
        "t19t20 t21 t22 t23 t24 t25 t26 t27",  # its first token starts earlier: no
        f"{tiny} and more",  # too short to be checked
        "é".join(TOKENS[3:16]),  # bytes beyond ASCII end a token
    ]
    assert check(documents, [long, short, tiny, ""], tmp_path) == [1, 2, 4, 9]
    leaks = find_leaks(store(documents, tmp_path / "store"), [long, short, tiny, ""], tmp_path)
    assert (leaks.not_checked, leaks.whole, leaks.documents) == (3, 1, 10)
    assert leaks.examples[0]["shared"] == " ".join(TOKENS[3:16])
    assert leaks.examples[2]["text"] == 1


def test_real_text_with_passages_copied_in(real_text, tmp_path):
    rng = random.Random(3)
    texts, documents = real_text[::3], [text for i, text in enumerate(real_text) if i % 3]
    for _ in range(60):
        words, target = rng.choice(texts).split(), rng.randrange(len(documents))
        start = rng.randrange(len(words))
        documents[target] += " " + " ".join(words[start : start + rng.randint(5, 25)])
    assert len(check(documents, texts, tmp_path)) > 20


FEW = st.lists(st.sampled_from(["a", "b", "B", "aa", "é", "."]), max_size=18).map(" ".join)
RUNS = st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda ab: " ".join(TOKENS[ab[0] : ab[0] + ab[1]]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(FEW, RUNS), max_size=8), st.lists(st.one_of(FEW, RUNS), max_size=5))
def test_equals_the_slow_twin(documents, texts):
    with TemporaryDirectory() as folder:
        check([*documents, "at least one document"], texts, Path(folder))


def test_runs_with_the_same_hash_are_told_apart(monkeypatch, tmp_path):
    """All runs get one hash here; the kernels around it run as plain Python."""
    monkeypatch.setattr(leak, "_run_hash", lambda *_: np.uint64(5))
    monkeypatch.setattr(leak, "_insert", leak._insert.py_func)
    monkeypatch.setattr(leak, "_scan", leak._scan.py_func)
    texts = [" ".join(TOKENS[:20]), " ".join(TOKENS[10:18]), " ".join(TOKENS[20:30])]
    documents = [" ".join(TOKENS[i : i + n]) for n in (7, 8, 10, 13) for i in range(len(TOKENS) - n + 1)]
    others = [" ".join(TOKENS[::-1]), "t10 t11 t12 t13 t14 t15 t16 t177", "t10 t11 t12 t13 t14 t15 t16 t1"]
    assert check([*documents, *others], texts, tmp_path)


def test_found_once_for_the_same_texts(tmp_path):
    corpus = store([" ".join(TOKENS), "other"], tmp_path / "store")
    seen = []
    first = find_leaks(corpus, [" ".join(TOKENS)], tmp_path, progress=lambda *progress: seen.append(progress))
    assert seen == [(2, 2, "looking for leaks")]
    again = find_leaks(corpus, [" ".join(TOKENS)], tmp_path, progress=lambda *progress: seen.append(progress))
    assert len(seen) == 1
    assert again.examples == first.examples
    assert find_leaks(corpus, ["other"], tmp_path).rows.tolist() == []
