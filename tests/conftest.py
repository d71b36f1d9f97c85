"""What all tests share: a tiny task, a tiny corpus of real English, and where the real data lies."""

import json
import os
import random
import re
from pathlib import Path
from pydoc_data import topics as pydoc_topics

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels for GPUs run on CPU tensors; read when triton is imported

THEMES = {
    "sport": ["match", "team", "coach", "goal", "league", "season", "player", "stadium", "victory", "injury"],
    "trade": ["market", "shares", "profit", "bank", "economy", "prices", "growth", "export", "dollar", "merger"],
    "stage": ["film", "actor", "music", "award", "album", "singer", "theatre", "audience", "director", "festival"],
}
FILLER = "the a of to in and on with for at by was has said that new after from this year it week more".split()


def themed_text(theme: str, rng: random.Random, words: int = 18) -> str:
    """A made-up sentence: every third word or so belongs to the theme, the rest to all of them."""
    return " ".join(rng.choice(THEMES[theme]) if rng.random() < 0.35 else rng.choice(FILLER) for _ in range(words))


def write_jsonl(path: Path, records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture(scope="session")
def tiny_task(tmp_path_factory) -> Path:
    """A task folder of three labels: 60 training, 30 dev and 45 test texts."""
    folder, rng = tmp_path_factory.mktemp("tiny_task"), random.Random(1)
    labels = sorted(THEMES)
    (folder / "card.json").write_text(json.dumps({"name": "tiny", "labels": labels, "metric": "macro_f1"}))
    for split, count in {"train": 60, "dev": 30, "test": 45}.items():
        rows = [{"text": themed_text(labels[i % 3], rng), "label": labels[i % 3]} for i in range(count)]
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> Path:
    """A corpus file of 600 documents: 300 themed ones, 300 paragraphs of Python's own manual (real English)."""
    rng = random.Random(2)
    documents = [themed_text(rng.choice(sorted(THEMES)), rng, words=30) for _ in range(300)]
    documents += manual_paragraphs()[:300]
    rows = [{"id": f"d{i:04d}", "text": text, "source": "tiny"} for i, text in enumerate(documents)]
    return write_jsonl(tmp_path_factory.mktemp("tiny_corpus") / "corpus.jsonl", rows)


def manual_paragraphs() -> list[str]:
    """About 2,000 paragraphs of real English that every Python carries: its language reference."""
    text = "\n\n".join(pydoc_topics.topics[name] for name in sorted(pydoc_topics.topics))
    paragraphs = [re.sub(r"\s+", " ", p).strip() for p in text.split("\n\n")]
    return list(dict.fromkeys(p for p in paragraphs if len(p.split()) >= 8))


@pytest.fixture(scope="session")
def real_text() -> list[str]:
    return manual_paragraphs()


@pytest.fixture(scope="session")
def tlm_data() -> Path:
    """The folder of real tasks and corpus; tests that need it are skipped where it is absent."""
    path = Path(os.environ.get("TLM_DATA", ""))
    if not os.environ.get("TLM_DATA") or not path.is_dir():
        pytest.skip("TLM_DATA does not name a folder with the real tasks and corpus")
    return path
