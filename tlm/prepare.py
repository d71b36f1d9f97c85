"""From a configuration to everything that training needs: task, selection, tokenizer, tokens, start of the embeddings.

All of it is cached by the hash of what made it, so that seeds, arms and restarts share it. The ledger is charged what a
cached thing cost when it was made: a run's cost does not depend on which run came first.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from retrieval import corpus as corpora
from retrieval import select
from retrieval.corpus import Corpus
from retrieval.leak import find_leaks
from retrieval.select import Selection
from retrieval.selectors import EVERYTHING
from tasks.errors import InputError
from tasks.readers import read_task
from tasks.types import SPLITS, Task
from tlm import warmstart
from tlm.config import DataConfig, ModelConfig, TrainConfig, num_bytes
from tlm.engine import World
from tlm.ledger import Ledger
from tlm.model import ModelShape
from tlm.objectives import Source
from tlm.progress import Progress
from tlm.run import read_json, write_json
from tlm.tokenizer import Encoder, cached_tokenizer, load_tokenizer, tokenizer_hash
from tlm.tokens import TokenStore, cached_tokens, heads, windows

# What `task=none` means: no labelled text at all, so that masked LM is all that is learnt.
NO_TASK = Task("none", ("none",), "macro_f1", dict.fromkeys(SPLITS, ()), "none", (), {})


@dataclass
class Prepared:
    task: Task
    tokenizer: Tokenizer
    max_length: int
    external: Source | None  # passages of the selection; None without a corpus
    held_out: Source | None  # `joint.held_out` others
    start: warmstart.Start | None  # of the embeddings and the output bias; None for a random start
    selection: "Selection | Whole | None"
    arm: str
    inputs: list[dict]
    data: dict
    sources: dict[str, Source] = field(default_factory=dict)

    @property
    def vocabulary(self) -> int:
        return self.tokenizer.get_vocab_size()

    def source(self, split: str) -> Source:
        """A split of the task, tokenized when it is first asked for: test after the last step."""
        if split not in self.sources:
            self.sources[split] = task_source(self.task, split, self.tokenizer, self.max_length)[0]
        return self.sources[split]

    def shape(self, model: ModelConfig) -> ModelShape:
        return ModelShape(
            vocabulary=self.vocabulary,
            hidden=model.hidden,
            layers=model.layers,
            heads=model.heads,
            intermediate=model.intermediate,
            max_length=model.max_length,
            num_labels=len(self.task.labels),
            pooling=model.pooling,
        )


def open_task(spec: str, data: DataConfig) -> Task:
    if spec == NO_TASK.name:
        return NO_TASK
    return read_task(
        spec,
        text_column=data.text_column,
        label_column=data.label_column,
        metric=data.metric,
        train_limit=data.train_limit,
        per_label=data.per_label,
        dev_limit=data.dev_limit,
        keep_duplicates=data.keep_duplicates,
        seed=data.seed,
    )


def arm_of(config: TrainConfig) -> str:
    """The name of the method that a configuration stands for, as comparisons call it."""
    if config.model.size == "tfidf":
        return "tfidf"
    if config.task == NO_TASK.name:
        return "pretraining"
    if config.init_from:
        return config.init_from if config.init_from.startswith("hf:") else "pt-ft"
    if not config.corpus:
        return "scratch"
    selector = config.retrieval.selector
    return {"bm25": "tlm", "random": "random"}.get(selector, f"tlm-{selector}")


def prepare(config: TrainConfig, task: Task, ledger: Ledger, progress: Progress, world: World) -> Prepared:
    """The first process makes what is not cached yet; the others find it there."""
    if world.rank > 0:
        world.barrier()
    prepared = make(config, task, ledger, progress)
    if world.rank == 0:
        world.barrier()
    return prepared


def make(config: TrainConfig, task: Task, ledger: Ledger, progress: Progress) -> Prepared:
    cache = Path(config.cache).expanduser()
    inputs, selection, corpus = [dict(i) for i in task.inputs], None, None
    if config.corpus:
        corpus = open_corpus(config.corpus, cache, ledger, progress)
        inputs.append({"path": config.corpus, "rows": len(corpus), "sha256": corpus.fingerprint})
        with progress.phase("retrieval"):
            if task is NO_TASK:
                selection = whole_corpus(corpus, config, cache, progress)
            else:
                selection = select_for(task, corpus, config, cache, progress)
        for phase, seconds in selection.manifest["seconds"].items():
            ledger.add_seconds(f"retrieval_{phase}", seconds)

    texts_key = f"{task.fingerprint}/{selection.fingerprint if selection else None}"
    own_texts = task.texts("train")
    with progress.phase("tokenizing"):
        words = config.tokenizer.vocabulary

        def learn() -> Tokenizer:
            texts = itertools.chain(own_texts, selection.texts() if selection else [])
            return cached_tokenizer(cache, texts_key, texts, words)

        if config.init_from:
            tokenizer = load_tokenizer(Path(config.init_from) / "tokenizer.json")
        else:
            tokenizer = charged(ledger, "tokenizing", cache, f"tokenizer/{words}/{texts_key}", learn)
        tokens = None
        if selection:
            key = f"selection/{selection.fingerprint}"

            def tokenize() -> TokenStore:
                return cached_tokens(cache, key, selection.texts(), tokenizer, progress.update)

            tokens = charged(ledger, "tokenizing", cache, f"{key}/{tokenizer_hash(tokenizer)}", tokenize)
    inputs.append({
        "path": "tokenizer.json", "rows": tokenizer.get_vocab_size(), "sha256": tokenizer_hash(tokenizer)
    })  # fmt: skip
    train, cut = task_source(task, "train", tokenizer, config.model.max_length)
    external = held_out = None
    if tokens:
        passages = windows(tokens, config.model.max_length)
        external = Source(passages.sequence, passages.lengths)
        if config.joint.held_out:
            external, held_out = hold_out(external, config.joint.held_out)

    start = None
    if config.init.method == "cooccurrence" and not config.init_from:
        with progress.phase("warm start"):
            start = warm_start(config, task, corpus, selection, tokenizer, tokens, cache, ledger, progress)
    data = {
        "train_examples": len(own_texts),
        "train_texts_cut": cut,
        "report": task.report,
        "external_documents": len(selection) if selection else 0,
        "external_tokens": int(tokens.manifest["tokens"]) if tokens else 0,
        "external_passages": len(external) if external else 0,
    }
    return Prepared(
        task,
        tokenizer,
        config.model.max_length,
        external,
        held_out,
        start,
        selection,
        arm_of(config),
        inputs,
        data,
        {"train": train},
    )


def open_corpus(spec: str, cache: Path, ledger: Ledger, progress: Progress) -> Corpus:
    with progress.phase("corpus"), ledger.phase("corpus"):
        return corpora.open_corpus(spec, cache, progress.update)


def select_for(
    tasks: Task | list[Task],
    corpus: Corpus,
    config: Any,
    cache: Path,
    progress: Progress,
    quota: list[float] | None = None,
) -> Selection:
    """The selection that `retrieval.*` asks for. One that is drawn is as large as the one by BM25 would be."""
    settings = vars(config.retrieval) | {"cache": cache, "threads": config.threads, "progress": progress.update}
    settings |= {"memory": num_bytes("retrieval.memory", config.retrieval.memory), "quota": quota, "seed": config.seed}
    if config.retrieval.selector in EVERYTHING:
        settings["like"] = select.select(tasks, corpus, **settings | {"selector": "bm25"})
    return select.select(tasks, corpus, **settings)


@dataclass(frozen=True)
class Whole:
    """The whole corpus in the place of a selection, without the documents that leak. `rows` is empty: none is chosen
    before others."""

    corpus: Corpus
    leaks: np.ndarray  # int64, rows
    manifest: dict
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.corpus) - len(self.leaks)

    @property
    def folder(self) -> Path:
        return self.corpus.folder

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.corpus.fingerprint.encode() + self.leaks.tobytes()).hexdigest()

    def texts(self) -> Iterator[str]:
        left_out = set(self.leaks.tolist())
        return (self.corpus[row].text for row in range(len(self.corpus)) if row not in left_out)


def whole_corpus(corpus: Corpus, config: TrainConfig, cache: Path, progress: Progress) -> Whole:
    """All documents but those that hold dev or test text of any task in `unseen`."""
    found, seconds = leaks_by_task(config.unseen, config.data, corpus, cache, config.threads, progress)
    rows = np.unique(np.concatenate([np.empty(0, np.int64), *found.values()]))
    words = int(corpus.statistics["words"] - corpus.words[rows].sum())
    leaks = {"dropped": len(rows), "by_task": {task: len(of_task) for task, of_task in found.items()}}
    return Whole(corpus, rows, {"words": words, "leaks": leaks, "seconds": {"leaks": seconds}})


def leaks_by_task(
    tasks: list[str], data: DataConfig, corpus: Corpus, cache: Path, threads: int, progress: Progress
) -> tuple[dict[str, np.ndarray], float]:
    """The corpus's rows that hold dev or test text, int64[leaks] by task, and the seconds that finding them took."""
    found = {}
    for spec in tasks:
        task = open_task(spec, data)
        found[spec] = find_leaks(
            corpus, [*task.texts("dev"), *task.texts("test")], cache, threads, progress.update
        )  # fmt: skip
    return {spec: leaks.rows for spec, leaks in found.items()}, sum(leaks.seconds for leaks in found.values())


def hold_out(source: Source, count: int) -> tuple[Source, Source]:
    """(The others, `count` passages), drawn alike for all seeds."""
    if count >= len(source):
        raise InputError(f"joint.held_out={count}: the selection has but {len(source)} passages; hold fewer out")
    order = np.random.default_rng(0).permutation(len(source))
    return source.take(np.sort(order[count:])), source.take(order[:count])


def encoded(texts: list[str], tokenizer: Tokenizer) -> TokenStore:
    """A store in memory."""
    ids, lengths = Encoder(tokenizer)(texts)
    return TokenStore(Path(), ids, np.concatenate([[0], np.cumsum(lengths)]), {})


def task_source(task: Task, split: str, tokenizer: Tokenizer, max_length: int) -> tuple[Source, int]:
    """A split as a source, and how many of its texts were cut to `max_length`."""
    passages, cut = heads(encoded(task.texts(split), tokenizer), max_length)
    return Source(passages.sequence, passages.lengths, np.array(task.targets(split), dtype=np.int64)), cut


def warm_start(config, task, corpus, selection, tokenizer, tokens, cache, ledger, progress) -> warmstart.Start:
    """From co-occurrence counts of the training texts and the selection or the corpus."""
    of_corpus = corpus is not None and config.init.source == "corpus"
    key = (
        f"{tokenizer_hash(tokenizer)}/{task.fingerprint}/{selection.fingerprint if selection else None}/"
        f"{(corpus.fingerprint, config.init.max_words) if of_corpus else None}"
    )
    stores = [encoded(task.texts("train"), tokenizer)]

    def start() -> warmstart.Start:
        if of_corpus:
            texts = sample(corpus, selection, config.init.max_words)
            stores.append(cached_tokens(cache, f"counted/{key}", texts, tokenizer, progress.update))
        elif tokens is not None:
            stores.append(tokens)
        texts = [(store.tokens, store.offsets) for store in stores]
        return warmstart.cached_start(cache, key, texts, tokenizer.get_vocab_size(), config.model.hidden)

    result = charged(ledger, "warm_start", cache, f"warm/{key}/{config.model.hidden}", start)
    words = corpus.statistics["words"] if of_corpus else selection.manifest["words"] if selection else 0
    counted = min(words, config.init.max_words) + len(stores[0].tokens)
    ledger.flops += warmstart.flops(tokenizer.get_vocab_size(), config.model.hidden, counted)
    return result


def sample(corpus: Corpus, selection: Selection, max_words: int) -> Iterator[str]:
    """The selection's texts, then others of the corpus in a fixed random order, leaks left out, up to `max_words`."""
    selected = set(selection.rows.tolist())
    left_out = selected | set(selection.leaks.tolist())
    others = np.random.default_rng(0).permutation(len(corpus)).tolist()
    words = 0
    for row in itertools.chain(sorted(selected), (r for r in others if r not in left_out)):
        text = corpus[row].text
        words += text.count(" ") + 1
        yield text
        if words >= max_words:
            return


def charged(ledger: Ledger, phase: str, cache: Path, key: str, work: Callable[[], Any]) -> Any:
    """The result of `work`, which may lie in the cache; `phase` is charged the seconds that making it took."""
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    record = cache / f"cost-{name}.json"
    start = time.perf_counter()
    result = work()
    if not record.exists():
        write_json(record, {"phase": phase, "seconds": time.perf_counter() - start})
    ledger.add_seconds(phase, read_json(record)["seconds"])
    return result
