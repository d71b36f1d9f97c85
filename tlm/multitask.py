"""`tlm pretrain`: one generative model on many prompted tasks (ZeroPrompt), with a corpus on its language as well.

ZeroPrompt (Xu et al. 2022, arXiv 2201.06910) trains on as many tasks as can be had, for tasks of kinds never seen. With
a corpus this is a general TLM: training inputs of every task query it, each task by its quota, and language modelling
of what they find is learnt jointly. The loop, and all that belongs to it, is that of trainer.py.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from retrieval import folders
from tasks.errors import InputError
from tasks.pool import Pool, PoolTask, open_pool, refuse_heldout
from tasks.prompts import Prompt
from tasks.types import Example as Text
from tasks.types import Task
from tlm import engine as engines
from tlm import evaluate, warmstart
from tlm.attention import LONGEST
from tlm.config import PretrainConfig, PromptsConfig
from tlm.engine import World
from tlm.instances import Instances, open_instances, pool_sha256
from tlm.ledger import Ledger
from tlm.lowbit import num_parameters
from tlm.mixture import TASK, Mixture, order
from tlm.model import ModelShape, Transformer
from tlm.objectives import Source
from tlm.plan import LEAST_WORDS, TOKENS_PER_WORD
from tlm.prepare import charged, open_corpus, select_for
from tlm.progress import Progress
from tlm.prompted import PromptedObjective, PromptMixture, PromptSource, Reader, packed, rendered, variants
from tlm.run import read_json, write_json
from tlm.task_mixture import TaskMixture, block_counts, shares
from tlm.tokenizer import cached_tokenizer, load_tokenizer, tokenizer_hash
from tlm.tokens import cached_tokens, windows
from tlm.trainer import Stage, begin, cost_of, describe_model, learn, mixture, write_model

WINDOW = LONGEST  # tokens, where model.max_length leaves it open
BLOCK = 4  # times the number of tasks: examples within which each task has its exact share
TEXTS_PER_TASK = 32  # prompts that the vocabulary and the start of the embeddings are made from
SAMPLED = 2000  # examples of the mixture that lengths are estimated from
MOST_QUERYING = 64  # tasks, each of which ranks the corpus by itself
DOCUMENTS_PER_QUERY = 50  # where retrieval.k leaves it open


@dataclass(frozen=True)
class Taken:
    """The tasks of a pool that train, and by task the rows of `instances` and the prompts."""

    pool: Pool
    sha256: str
    instances: Instances
    tasks: list[PoolTask]
    rows: dict[str, np.ndarray]
    prompts: dict[str, tuple[Prompt, ...]]
    dropped: int  # instances that stand in held-out tasks

    @property
    def source(self) -> dict:
        return {"path": self.pool.path, "rows": len(self.instances), "sha256": self.sha256}

    @property
    def counts(self) -> dict:
        return {
            "tasks": len(self.tasks),
            "categories": sorted({task.category for task in self.tasks}),
            "train_examples": int(sum(map(len, self.rows.values()))),
            "templates": sum(map(len, self.prompts.values())),
            "dropped_as_heldout": self.dropped,
        }

    def mixture(self, plain: Mixture, settings: PromptsConfig) -> PromptMixture:
        """`plain`, drawing its task's examples out of the pool."""
        sizes = [len(self.rows[task.name]) for task in self.tasks]
        of_tasks = shares(
            sizes, [task.family for task in self.tasks], settings.task_cap, settings.family_share, settings.temperature
        )
        templates = [len(self.prompts[task.name]) for task in self.tasks]
        counts = block_counts(of_tasks, BLOCK * len(self.tasks)).tolist()
        names = tuple(task.name for task in self.tasks)
        drawing = TaskMixture(plain.seed, names, tuple(sizes), tuple(templates), tuple(counts), batch=1)
        return PromptMixture(**vars(plain), tasks=drawing, rows=tuple(self.rows[name] for name in names))

    def dev_rows(self, number: int) -> np.ndarray:
        """Of the test split of these tasks, the same for all seeds."""
        rows = np.concatenate([self.instances.rows(task.name, "test") for task in self.tasks])
        if not len(rows):
            raise InputError(f"{self.pool.path}: no task that trains has a test split to score; set joint.eval_every=0")
        return np.sort(np.random.default_rng(0).permutation(rows)[:number])


@dataclass
class PreparedPool:
    """What `learn` and the stage need, as Prepared."""

    taken: Taken
    prompts: PromptSource
    reader: Reader
    attention: str
    external: Source | None
    start: warmstart.Start | None
    selection: Any
    inputs: list[dict]
    data: dict
    held_out: None = None

    @property
    def tokenizer(self) -> Tokenizer:
        return self.reader.tokenizer

    def shape(self, model: Any) -> ModelShape:
        return ModelShape(
            self.tokenizer.get_vocab_size(), model.hidden, model.layers, model.heads, model.intermediate,
            model.max_length, num_labels=1, pooling=model.pooling, attention=self.attention,
            soft=self.reader.soft * (1 + len(self.taken.tasks)),
        )  # fmt: skip


@engines.in_touch()
def pretrain(config: PretrainConfig, progress: Progress | None = None) -> dict:
    """One run, from a pool to `summary.json`; returns the summary. A finished run is not run again."""
    pool = open_pool(config.pool.path, config.pool.heldout)  # first, so that bad data is told at once
    tasks = pool.select(config.pool.categories)
    if not tasks:
        raise InputError("pool.categories=[]: names no task to train on; leave it out for all that are not held out")
    refuse_heldout(pool, tasks)
    if (config.init_from or "").startswith("hf:"):
        from tlm.biencoder import pretrain_encoder

        return pretrain_encoder(config, pool, tasks, progress or Progress())
    config.run = config.run or run_name(config)
    world, run, progress = begin(config, progress)
    if run.summary_path.exists():
        return read_json(run.summary_path)

    ledger, config = Ledger(), fitted(config)
    if world.rank > 0:
        world.barrier()
    prepared = prepare(config, pool, tasks, ledger, progress)
    if world.rank == 0:
        world.barrier()
    config, model, ledger, last = learn(config, run, prepared, stages, ledger, progress, world)
    return finish(config, run, model, ledger, last, prepared, world)


def run_name(config: PretrainConfig) -> str:
    """Made from what runs: pool, number of tasks, attention and seed."""
    name, tasks = Path(config.pool.path.rstrip("/")).name, config.pool.tasks or "all"
    return f"{name}-{tasks}-{config.attention}{'-lm' if config.corpus else ''}-{config.seed}"


def fitted(config: PretrainConfig) -> PretrainConfig:
    """With a window and bounds of the selection where the configuration leaves them open."""
    model, retrieval, joint = config.model, config.retrieval, config.joint
    model = replace(model, max_length=model.max_length or WINDOW)
    if config.corpus and not (retrieval.max_words or retrieval.max_documents):
        tokens = joint.steps * joint.accumulation * joint.batch_tokens
        if config.budget:
            tokens = config.budget / 6 / (model.layers * (4 * model.hidden**2 + 3 * model.hidden * model.intermediate))
        share = joint.external_per_task / (joint.external_per_task + 1)
        retrieval = replace(retrieval, max_words=max(LEAST_WORDS, round(share * tokens / TOKENS_PER_WORD)))
    return replace(config, model=model, retrieval=replace(retrieval, k=retrieval.k or DOCUMENTS_PER_QUERY))


def prepare(
    config: PretrainConfig, pool: Pool, tasks: list[PoolTask], ledger: Ledger, progress: Progress
) -> PreparedPool:
    """Everything that training needs, cached by what made it."""
    cache, settings = Path(config.cache).expanduser(), config.pool
    taken = take(config, pool, tasks, ledger, progress)
    instances, tasks, rows, prompts, sha256 = taken.instances, taken.tasks, taken.rows, taken.prompts, taken.sha256
    unprompted = [(name, number) for name, of_task in rows.items() for number in of_task[:TEXTS_PER_TASK]]

    def texts():
        for name, row in unprompted:
            prompted = rendered(instances[row], prompts[name][row % len(prompts[name])])
            yield f"{prompted.text}\n{prompted.answers[prompted.gold]}"

    corpus = selection = tokens = external = start = None
    inputs = [taken.source]
    if config.corpus:
        corpus = open_corpus(config.corpus, cache, ledger, progress)
        inputs.append({"path": config.corpus, "rows": len(corpus), "sha256": corpus.fingerprint})
        with progress.phase("retrieval"):
            querying, quota = as_tasks(instances, tasks, rows, settings.queries)
            selection = select_for(querying, corpus, config, cache, progress, quota)
        for phase, seconds in selection.manifest["seconds"].items():
            ledger.add_seconds(f"retrieval_{phase}", seconds)

    key = folders.key(
        pool=sha256,
        rows=[int(row) for _, row in unprompted],
        prompts={name: list(map(asdict, of_task)) for name, of_task in prompts.items()},
        selection=selection.fingerprint if selection else None,
    )
    with progress.phase("tokenizing"):
        vocabulary = config.tokenizer.vocabulary
        if config.init_from:
            tokenizer = load_tokenizer(Path(config.init_from) / "tokenizer.json")
        else:
            tokenizer = charged(
                ledger, "tokenizing", cache, f"tokenizer/{vocabulary}/{key}",
                lambda: cached_tokenizer(cache, key, itertools.chain(texts(), selection.texts() if selection else []),
                                         vocabulary),
            )  # fmt: skip
        if selection:
            tokens = charged(
                ledger, "tokenizing", cache, f"selection/{selection.fingerprint}/{tokenizer_hash(tokenizer)}",
                lambda: cached_tokens(cache, f"selection/{selection.fingerprint}", selection.texts(), tokenizer,
                                      progress.update),
            )  # fmt: skip
            passages = windows(tokens, config.model.max_length)
            external = Source(passages.sequence, passages.lengths)
        reader = Reader(
            tokenizer, config.model.max_length, settings.soft, {task.name: i for i, task in enumerate(tasks, 1)}
        )
        check_room(reader, prompts)
        cut = long_answers(instances, rows, reader, settings.long_answers, sha256, cache, progress)
    inputs.append({"path": "tokenizer.json", "rows": tokenizer.get_vocab_size(), "sha256": tokenizer_hash(tokenizer)})

    if config.init.method == "cooccurrence" and not config.init_from:

        def first_vectors() -> warmstart.Start:
            stores = [cached_tokens(cache, f"prompts/{key}", texts(), tokenizer), *([tokens] if tokens else [])]
            of_stores = [(store.tokens, store.offsets) for store in stores]
            return warmstart.cached_start(cache, key, of_stores, tokenizer.get_vocab_size(), config.model.hidden)

        with progress.phase("warm start"):
            name = f"warm/{key}/{config.model.hidden}/{tokenizer_hash(tokenizer)}"
            start = charged(ledger, "warm_start", cache, name, first_vectors)
        words = selection.manifest["words"] if selection else 0
        ledger.flops += warmstart.flops(tokenizer.get_vocab_size(), config.model.hidden, words + 100 * len(unprompted))

    source = PromptSource(instances, prompts, reader, np.zeros(0, np.int64), np.zeros(0, np.int64))
    data = {
        **taken.counts,
        "answers_cut": cut,
        "external_documents": len(selection) if selection else 0,
        "external_tokens": int(tokens.manifest["tokens"]) if tokens else 0,
        "external_passages": len(external) if external else 0,
    }
    return PreparedPool(taken, source, reader, config.attention, external, start, selection, inputs, data)


def take(config: PretrainConfig, pool: Pool, tasks: list[PoolTask], ledger: Ledger, progress: Progress) -> Taken:
    cache, settings, dropped = Path(config.cache).expanduser(), config.pool, Counter()
    sha256 = pool_sha256(pool)
    with progress.phase("pool"):
        instances = charged(
            ledger, "pool", cache, f"pool/{sha256}", lambda: open_instances(pool, sha256, cache, progress.update)
        )
    rows = instances.training_rows([task.name for task in tasks], dropped)
    tasks = drawn(pool, tasks, rows, settings.tasks, config.seed)
    rows = {task.name: limited(rows[task.name], task.name, settings.per_task, config.seed) for task in tasks}
    prompts = {task.name: variants(task, settings.choices, settings.templates) for task in tasks}
    return Taken(pool, sha256, instances, tasks, rows, prompts, dropped.total())


def drawn(
    pool: Pool, tasks: list[PoolTask], rows: dict[str, np.ndarray], number: int | None, seed: int
) -> list[PoolTask]:
    """The tasks that train: `number` of those with instances, the first of one random order, as the pool lists them.

    Raises InputError for a category of which nothing is left, and where there are not so many tasks.
    """
    found = [task for task in tasks if len(rows[task.name])]
    if empty := sorted({task.category for task in tasks} - {task.category for task in found}):
        raise InputError(
            f"{pool.path}: the category {empty[0]!r} has no training instance, or all stand in held-out tasks; leave "
            "it out of pool.categories"
        )
    if number is None:
        return found
    if number > len(found):
        raise InputError(f"pool.tasks={number}: only {len(found)} tasks have training instances; ask for no more")
    return [found[i] for i in np.sort(order(seed, "tasks", 0, len(found))[:number])]


def limited(rows: np.ndarray, task: str, number: int | None, seed: int) -> np.ndarray:
    """`number` of the rows, the first of a random order, in theirs."""
    return rows if number is None else rows[np.sort(order(seed, f"rows of {task}", 0, len(rows))[:number])]


def check_room(reader: Reader, prompts: dict[str, tuple[Prompt, ...]]) -> None:
    if reader.max_length - 2 - reader.soft - reader.most_answer < 4:
        raise InputError(
            f"pool.soft={reader.soft}: leaves no room for text in a window of {reader.max_length} tokens; raise "
            "model.max_length or ask for fewer"
        )


def long_answers(
    instances: Instances, rows: dict[str, np.ndarray], reader: Reader, answer: str, sha256: str, cache: Path,
    progress: Progress,
) -> int:  # fmt: skip
    """How many training instances have an answer that is cut. Raises InputError if `answer` is to refuse them."""
    texts = (instances[row].target for row in range(len(instances)))
    store = cached_tokens(cache, f"targets/{sha256}", texts, reader.tokenizer, progress.update)
    of_tasks = np.concatenate(list(rows.values()))
    long = of_tasks[np.diff(store.offsets)[of_tasks] + 1 > reader.most_answer]
    if len(long) and answer == "refuse":
        first = instances[long[0]]
        raise InputError(
            f"{instances.pool.path}: the answer of {first.id} ({first.task}) is longer than {reader.most_answer} "
            f"tokens, half the window, as are {len(long) - 1} others; raise model.max_length, or set "
            "pool.long_answers=cut"
        )
    return len(long)


def as_tasks(
    instances: Instances, tasks: list[PoolTask], rows: dict[str, np.ndarray], queries: int
) -> tuple[list[Task], list[float]]:
    """What queries a corpus: inputs of the training instances, a Task each, and the quota of each. More than
    MOST_QUERYING tasks are put together by category, whose quota is their number.

    Their test inputs, and all inputs of held-out tasks, stand in test and dev splits, so that no document that holds
    them is selected."""

    def texts(found: Sequence[int]) -> tuple[Text, ...]:
        return tuple(Text(instance.id, instance.input, "") for instance in map(instances.__getitem__, found))

    groups: dict[str, list[str]] = {}
    for task in tasks:
        groups.setdefault(task.name if len(tasks) <= MOST_QUERYING else task.category, []).append(task.name)
    held = np.flatnonzero(np.isin(instances.tasks, [instances.numbers[task.name] for task in instances.pool.heldout]))
    result = []
    for group, names in groups.items():
        spread = [rows[name][np.linspace(0, len(rows[name]) - 1, queries).astype(np.int64)] for name in names]
        test = np.concatenate([instances.rows(name, "test") for name in names])
        splits = {"train": texts(np.unique(np.concatenate(spread))), "dev": texts(held), "test": texts(test)}
        result.append(Task(group, ("",), "accuracy", splits, instances.pool.path, (), {}))
        held = held[:0]  # once is enough
    return result, [float(len(names)) for names in groups.values()]


def stages(config: PretrainConfig, prepared: PreparedPool, world: World) -> tuple[Stage]:
    """The one stage, at its first step."""
    seed, taken = 2 * config.seed, prepared.taken
    trial = taken.mixture(Mixture(seed, {}, {}, 0), config.pool)
    sample = [prepared.prompts.example(n) for n in trial.examples_at(TASK, np.arange(SAMPLED))]
    lengths, answers = (np.array([f(e) for e in sample]) for f in (lambda e: len(e.inputs), lambda e: e.answer + 1))
    objective = PromptedObjective(replace(prepared.prompts, lengths=lengths, answers=answers), prepared.external)
    rho1 = config.joint.external_per_task if prepared.external else 0
    drawing = taken.mixture(mixture("joint", config.joint, objective, seed, rho1, world), config.pool)
    dev = dev_source(prepared, config.joint.dev) if config.joint.eval_every else None
    return (Stage("joint", config.joint, objective, drawing, lambda m, w: dev_scores(m, w, dev), "token_accuracy"),)


def dev_source(prepared: PreparedPool, number: int) -> list:
    """Examples of the test split of the tasks that train, each under the first template: the same for all seeds."""
    taken, reader = prepared.taken, replace(prepared.reader)
    found = [taken.instances[row] for row in taken.dev_rows(number)]
    return [reader.example(rendered(instance, taken.prompts[instance.task][0]), instance.task) for instance in found]


@torch.no_grad()
def dev_scores(model: Transformer, world: World, examples: list) -> dict[str, float]:
    """Mean loss and accuracy of an answer's token, those before it given."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    sums = np.zeros(3)
    lengths = np.array([len(example.inputs) for example in examples])
    for part in evaluate.batches_by_length(lengths)[world.rank :: world.size]:
        batch = packed([examples[i] for i in part]).to(device)
        logits = model.mlm_logits(model(batch)[batch.masked])[: len(batch.masked_tokens)].double().log_softmax(-1)
        log_p = logits.gather(1, batch.masked_tokens[:, None]).sum().item()
        sums += -log_p, (logits.argmax(-1) == batch.masked_tokens).sum().item(), len(batch.masked_tokens)
    model.train(was_training)
    loss, right, number = world.sum(sums.tolist())
    return {"loss": loss / number, "token_accuracy": right / number}


def finish(config, run, model, ledger, last: Stage, prepared: PreparedPool, world) -> dict:
    """The model, what it has been shown, and, last, the summary."""
    if not last.best and config.joint.eval_every:
        last.best = last.score(model, world) | {"step": last.step}
    selection = prepared.selection
    summary = {
        "name": run.folder.name,
        "task": Path(prepared.taken.pool.path).name,
        "metric": last.metric,
        "labels": [],
        "arm": "general-tlm" if selection else "zeroprompt",
        "seed": config.seed,
        "dev": last.best or None,
        "test": None,
        "model": describe_model(model) | {"attention": model.shape.attention},
        "data": prepared.data | {"external_tokens_seen": ledger.external_tokens},
        "selection": {"folder": str(selection.folder), **selection.manifest} if selection else None,
        "cost": ledger.cost(num_parameters(model), config.price_per_hour),
        "init_from": {"folder": config.init_from, "cost": cost_of(config.init_from)} if config.init_from else None,
        "config_sha256": run.config_sha256,
        "tokenizer_sha256": tokenizer_hash(prepared.tokenizer),
    }
    if world.rank == 0:
        write_model(run.folder / "model", model, prepared, config, ledger)
        write_json(run.folder / "model" / "pool.json", shown(config, prepared.taken.tasks))
        write_json(run.summary_path, summary)
    return summary


def shown(config: PretrainConfig, tasks: Sequence[PoolTask]) -> dict:
    """pool.json beside the weights: what `tlm eval` needs to prompt them, and to know what is unseen."""
    trained = {task.name: task.category for task in tasks}
    before = read_json(Path(config.init_from) / "pool.json") if has_pool(config.init_from) else {"seen": {}}
    return {
        "tasks": trained,  # in the order of their soft prompts
        "seen": before["seen"] | trained,  # by these weights and those that they began from
        "soft": config.pool.soft,
        "choices": config.pool.choices,
        "templates": config.pool.templates,
    }


def has_pool(folder: str | None) -> bool:
    return folder is not None and (Path(folder) / "pool.json").exists()
