"""What all tests share: a tiny task, a tiny corpus of real English, and where the real data lies."""

import json
import os
import random
import re
from pathlib import Path
from pydoc_data import topics as pydoc_topics

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels for GPUs run on CPU tensors; read when triton is imported
if os.environ["TRITON_INTERPRET"] == "1":  # else the tests of test_gpu.py and test_kernels.py are meant, on a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

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


PRETRAIN = [
    "model.hidden=32", "model.layers=2", "model.heads=2", "model.intermediate=48", "model.max_length=48",
    "tokenizer.vocabulary=320", "joint.steps=24", "joint.batch=6", "joint.eval_every=12", "joint.dev=20", "threads=1",
    "checkpoint_seconds=0", "boards=[]",
]  # fmt: skip
POOL_TASKS = {  # name -> category, format, prompts
    "theme": ("topics", "choice", ["{input}\nWhat is it about?", "Topic of: {input}\n{choices}"]),
    "first": ("topics", "generate", ["{input}\nThe first word is"]),
    "even": ("numbers", "choice", ["Is {input} even?", {"template": "{input} even?\n{choices}", "listing": "letters"}]),
    "hidden": ("riddles", "choice", ["{input}\nWhat is it about?"]),
    "spell": ("riddles", "generate", ["Say {input}"]),
}


def pool_records(name, rng):
    """26 training and 12 test instances; one training input of `first` stands in `hidden` as well."""
    for i in range(38):
        theme = rng.choice(sorted(THEMES))
        text = " ".join([rng.choice(FILLER), *rng.sample(THEMES[theme], 3), str(i)])
        target, choices = theme, sorted(THEMES)
        if name == "even":
            text, target, choices = f"{i} or {i + 1000}", ("no", "yes")[i % 2 == 0], ["no", "yes"]
        elif name in ("first", "spell"):
            target, choices = text.split()[0], None
        if i == 5 and name in ("first", "hidden"):
            text, target = ("the same text", "the") if name == "first" else ("The same text!", "trade")
        split = "train" if i < 26 else "test"
        yield dict(task=name, id=f"{name}-{i}", split=split, input=text, target=target, choices=choices)


@pytest.fixture(scope="session")
def pool_folder(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("tiny_pool"), random.Random(3)
    write_jsonl(
        folder / "tasks.jsonl",
        [
            dict(task=name, category=category, format=format, prompts=prompts, shard="one", n_train=26, n_test=12)
            for name, (category, format, prompts) in POOL_TASKS.items()
        ],
    )
    (folder / "splits.json").write_text(
        json.dumps({"train_categories": ["topics", "numbers"], "heldout_categories": ["riddles"]})
    )
    write_jsonl(folder / "one.jsonl", [record for name in POOL_TASKS for record in pool_records(name, rng)])
    return folder


@pytest.fixture(scope="session")
def pool_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("pool_cache")


def pretrain(pool_folder, pool_cache, out, *more):
    from tlm.cli import main

    return main(["pretrain", f"pool={pool_folder}", f"cache={pool_cache}", f"out={out}", *PRETRAIN, *more])


@pytest.fixture(scope="session")
def pretrained(pool_folder, pool_cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrained")
    assert pretrain(pool_folder, pool_cache, out, "run=whole", "attention=causal") == 0
    return out / "whole"


@pytest.fixture(scope="session")
def general_run(pool_folder, pool_cache, tiny_corpus, tmp_path_factory):
    """Prefix attention, general_run text beside the pool, soft prompts, and a budget."""
    out = tmp_path_factory.mktemp("general_run")
    more = [f"corpus={tiny_corpus}", "pool.soft=2", "budget=2e9", "pool.per_task=20", "joint.dev=5", "precision=fp32"]
    assert pretrain(pool_folder, pool_cache, out, "run=general_run", "init=random", *more) == 0
    return out / "general_run"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, real_text):
    """A tiny BERT with random weights and a vocabulary of its own."""
    transformers = pytest.importorskip("transformers")
    import torch

    from tlm.tokenizer import SPECIALS, train_tokenizer

    folder = tmp_path_factory.mktemp("checkpoint")
    words = train_tokenizer(real_text[:200], 500)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIALS, strict=True))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=words.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def in_this_process(monkeypatch):
    """Contestants of a bench take one turn each, here."""
    from tlm.benches import kernels, rounds

    def contest(title, contestants, *_):
        def first(contestant):
            turns = contestant()
            next(turns)
            return [next(turns)]

        return {name: rounds.Record(first(contestant)) for name, contestant in contestants.items()}

    monkeypatch.setattr(rounds, "contest", contest)
    monkeypatch.setattr(kernels, "LEAST_SECONDS", 0.0001)


class Here:
    """A run of tlm/jobs.py made in this process rather than in another."""

    def __init__(self, run):
        from tlm.cli import main

        self.returncode = main([run.verb, *run.settings])

    def poll(self):
        return self.returncode


@pytest.fixture
def jobs_here(monkeypatch):
    from tlm import jobs

    monkeypatch.setattr(jobs, "start", Here)
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0)
