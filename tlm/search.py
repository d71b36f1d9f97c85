"""`tlm search RUN pool=P`: for each task the best prompt that a genetic search finds, beside those it comes with.

Genetic prompt search (GPS: Xu et al. 2022, arXiv 2210.17041) without a language model that paraphrases: selection of
the fittest, crossover and mutation over templates, listings of choices and verbalisers (tasks/genes.py). A prompt is
judged by a few instances of the task's train split, which a held-out task has without having trained on it: by its
accuracy, and among equals by the mean probability of the right choice; or, without labels, by the mutual information of
inputs and choices, H(mean p) - mean H(p) (Sorensen et al. 2022, arXiv 2203.11364). The test split is read once, by the
prompts that the task came with and by the one found.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from tasks.errors import InputError
from tasks.genes import Genes, begin, crossover, genes_of, mutate
from tasks.pool import Instance, Pool, PoolTask, open_pool
from tasks.prompts import Prompt
from tlm.config import SearchConfig
from tlm.instances import Instances, open_instances, pool_sha256
from tlm.ledger import Ledger
from tlm.mixture import order
from tlm.progress import Progress
from tlm.prompted import variants
from tlm.run import write_json
from tlm.votes import scores_under
from tlm.zeroshot import Found, open_run, refuse_seen, some, summary, table, with_choices


def search_runs(names: Sequence[str], config: SearchConfig) -> int:
    """Prints a table for each run and writes RUN/search.json."""
    from rich.console import Console

    pool, progress = open_pool(config.pool), Progress()
    tasks = with_choices(pool, pool.select(config.categories), config.categories, progress)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    runs = [open_run(name) for name in names]
    for run in runs:
        if not config.seen:
            refuse_seen(run, pool, tasks)
    sha256 = pool_sha256(pool)
    with progress.phase("pool"):
        instances = open_instances(pool, sha256, Path(config.cache).expanduser(), progress.update)
    tasks = [task for task in tasks if all(len(instances.rows(task.name, split)) for split in ("train", "test"))]
    if not tasks:
        raise InputError(f"{pool.path}: no task of {', '.join(config.categories)} has training and test instances")
    tasks = [tasks[i] for i in np.sort(order(config.seed, "tasks", 0, len(tasks))[: config.most_tasks])]
    for run in runs:
        found, prompts, costs = [], {}, {name: Ledger() for name in ("search", "test")}
        with progress.phase("search", len(tasks)):
            for number, task in enumerate(tasks, 1):
                scores, prompts[task.name] = search_task(run, pool, instances, task, config, costs)
                found.append(scores)
                progress.update(number, len(tasks), task.name)
        result = {
            "run": str(run.folder), "pool": {"path": pool.path, "sha256": sha256}, "categories": config.categories,
            "judged_by": "labels" if config.labels else "mutual information", "shots": config.shots,
            "prompts_judged": sum(found["judged"] for found in prompts.values()),
            "cost": {name: {"flops": ledger.flops, "tokens": ledger.tokens,
                            "seconds": round(sum(ledger.seconds.values()), 3)} for name, ledger in costs.items()},
            "prompts": prompts, **summary(found),
        }  # fmt: skip
        write_json(run.folder / "search.json", result)
        Console().print(table(result))
        print(run.folder / "search.json")
    return 0


def search_task(
    run, pool: Pool, instances: Instances, task: PoolTask, config: SearchConfig, costs: dict[str, Ledger]
) -> tuple[Found, dict]:
    """Scores on test of the mean prompt of the task's own, of the fittest of these, and of the one found; and what was
    found."""
    rows = instances.rows(task.name, "train")
    shots = [instances[row] for row in rows[np.sort(order(config.seed, task.name, 0, len(rows))[: config.shots])]]
    own = own_genes(variants(task, run.choices, run.templates))
    judge = by_labels if config.labels else by_information

    def fitness(genes: Genes) -> tuple[float, ...]:
        return judge(scores_under(run, shots, genes, config.rule), shots)

    with spent(run, costs["search"], "search"):
        known = search(fitness, own, config.population, config.generations, random.Random(f"{config.seed} {task.name}"))
    best = max(known, key=known.get)
    best_own = max((genes for genes in known if genes in own), key=known.get, default=best)
    test = [instances[row] for row in some(instances.rows(task.name, "test"), config.limit)]
    with spent(run, costs["test"], "test"):
        rights = {genes: right(scores_under(run, test, genes, config.rule), test) for genes in {*own, best, best_own}}
    by_prompt = {
        "mean_prompt": np.mean([rights[genes] for genes in own or [best_own]], 0),
        "own_prompt": rights[best_own],
        "found_prompt": rights[best],
    }
    by_prompt["found_prompt_gain"] = by_prompt["found_prompt"] - by_prompt["mean_prompt"]
    result = Found(task)
    for i, instance in enumerate(test):
        result.add({name: float(values[i]) for name, values in by_prompt.items()}, 1 / len(instance.choices), instance)
    result.balance(["found_prompt"])
    return result, asdict(best) | {
        "template": best.template, "fitness": known[best], "fitness_of_own": known[best_own], "judged": len(known)
    }  # fmt: skip


def search(
    fitness: Callable[[Genes], tuple[float, ...]], own: Sequence[Genes], population: int, generations: int,
    rng: random.Random,
) -> dict[Genes, tuple[float, ...]]:  # fmt: skip
    """Every prompt that was judged, with its fitness. The fittest so far are the parents of each generation."""
    known = {genes: fitness(genes) for genes in begin([as_prompt(genes) for genes in own], population, rng)}
    for _ in range(generations):
        parents = sorted(known, key=known.get, reverse=True)[: max(2, population // 2)]
        children: dict[Genes, None] = {}
        while len(children) < population:
            child = mutate(crossover(*rng.sample(parents, 2), rng), rng)
            if child not in known:
                children[child] = None
        known |= {child: fitness(child) for child in children}
    return known


@contextmanager
def spent(run, ledger: Ledger, phase: str):
    """What `run` spends in here is added to the ledger."""
    flops, tokens = run.ledger.flops, run.ledger.tokens
    with ledger.phase(phase):
        yield
    ledger.flops += run.ledger.flops - flops
    ledger.tokens += run.ledger.tokens - tokens


def own_genes(prompts: Sequence[Prompt]) -> list[Genes]:
    return list(dict.fromkeys(genes for prompt in prompts if (genes := genes_of(prompt))))


def as_prompt(genes: Genes) -> Prompt:
    return Prompt(genes.template, genes.listing, dict(genes.answers))


def right(scores: Sequence[np.ndarray], instances: Sequence[Instance]) -> np.ndarray:
    """float64[n]"""
    pairs = zip(scores, instances, strict=True)
    return np.array([float(s.argmax() == instance.choices.index(instance.target)) for s, instance in pairs])


def shares(scores: np.ndarray) -> np.ndarray:
    """softmax"""
    raised = np.exp(scores - scores.max())
    return raised / raised.sum()


def by_labels(scores: Sequence[np.ndarray], shots: Sequence[Instance]) -> tuple[float, float]:
    """(accuracy, mean probability of the right choice)"""
    gold = [shares(s)[i.choices.index(i.target)] for s, i in zip(scores, shots, strict=True)]
    return float(right(scores, shots).mean()), float(np.mean(gold))


def by_information(scores: Sequence[np.ndarray], shots: Sequence[Instance]) -> tuple[float]:
    """(H(mean p) - mean H(p),) in nats, p by the number of a choice."""
    table = np.zeros((len(scores), max(map(len, scores))))
    for row, s in zip(table, scores, strict=True):
        row[: len(s)] = shares(s)
    return (float(entropy(table.mean(0)) - np.mean([entropy(row) for row in table])),)


def entropy(shares: np.ndarray) -> float:
    return float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())
