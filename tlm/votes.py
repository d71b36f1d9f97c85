"""`tlm eval RUN pool=P votes=N`: each instance is asked under N prompts, and their votes are combined.

After AMA (Arora et al. 2022, arXiv 2210.02441): many imperfect prompts vote, and the LabelModel of the package snorkel
(Ratner et al. 2019, arXiv 1810.02840) learns from where they agree, without labels, how far each is to be trusted.
Beside it the majority, and the mean of single prompts. Prompts are the task's own and mutations of them
(tasks/genes.py); the model of a task is fitted to the votes that it then combines. A vote is the number of a choice in
its instance's list, so that where each instance has choices of its own the model learns about places, and little else.
"""

import random
import time
from collections.abc import Callable, Sequence

import numpy as np

from tasks.genes import Genes, begin, express
from tasks.pool import Instance, Pool
from tlm.config import EvalConfig
from tlm.instances import Instances
from tlm.prompted import rendered, variants
from tlm.zeroshot import Found

EPOCHS, RATE = 100, 0.01  # of the LabelModel: snorkel's own


def voted(
    run, pool: Pool, instances: Instances, rows: np.ndarray, config: EvalConfig, update: Callable
) -> tuple[list[Found], float]:
    """Every task's scores, and the seconds of asking and combining."""
    start, found, done = time.perf_counter(), [], 0
    for task in dict.fromkeys(instances.tasks[rows].tolist()):
        of_task = [instances[row] for row in rows[instances.tasks[rows] == task]]
        found.append(combined(run, pool, of_task, config))
        done += len(of_task)
        update(done, len(rows), "instances")
    return found, time.perf_counter() - start


def combined(run, pool: Pool, of_task: Sequence[Instance], config: EvalConfig) -> Found:
    """Of a task's instances whether the mean prompt, the majority and the LabelModel are right."""
    task = pool.tasks[of_task[0].task]
    prompts = begin(variants(task, run.choices, run.templates), config.votes, random.Random(task.name))
    votes = np.stack([[s.argmax() for s in scores_under(run, of_task, p, config.rule)] for p in prompts], 1)
    gold = np.array([instance.choices.index(instance.target) for instance in of_task])
    sizes = np.array([len(instance.choices) for instance in of_task])
    rights = {"mean_prompt": (votes == gold[:, None]).mean(1), "majority": majority(votes, gold)}
    if (shares := label_model(votes, int(sizes.max()))) is not None:
        shares[np.arange(sizes.max()) >= sizes[:, None]] = -1.0
        rights["label_model"] = (shares.argmax(1) == gold).astype(float)
    result = Found(task)
    for i, size in enumerate(sizes):
        of_one = {name: float(right[i]) for name, right in rights.items()}
        gains = {f"{name}_gain": right - of_one["mean_prompt"] for name, right in of_one.items()}
        del gains["mean_prompt_gain"]
        result.add(of_one | gains, 1 / size)
    return result


def scores_under(run, instances: Sequence[Instance], genes: Genes, rule: str) -> list[np.ndarray]:
    """Of each instance the scores of its choices under one prompt, float64[choices]."""
    prompted = [rendered(instance, express(genes, instance.choices)) for instance in instances]
    found = run.choice_scores(prompted, [instance.task for instance in instances], (rule,))
    return [next(iter(scores.values())) for scores in found]


def majority(votes_NP: np.ndarray, gold_N: np.ndarray) -> np.ndarray:
    """Whether most votes are for the right choice, float64[N]: among k with as many, 1 / k."""
    counts = np.stack([(votes_NP == choice).sum(1) for choice in range(max(votes_NP.max(), gold_N.max()) + 1)], 1)
    first = counts == counts.max(1, keepdims=True)
    return first[np.arange(len(gold_N)), gold_N] / first.sum(1)


def label_model(votes_NP: np.ndarray, choices: int) -> np.ndarray | None:
    """Probabilities of the choices, float64[N, choices], by snorkel; None where it is not installed."""
    try:
        from snorkel.labeling.model import LabelModel
    except ImportError:
        return None
    if choices < 2:
        return np.ones((len(votes_NP), 1))
    model = LabelModel(cardinality=choices, verbose=False)
    model.fit(votes_NP, n_epochs=EPOCHS, lr=RATE, seed=0, progress_bar=False)
    return model.predict_proba(votes_NP)
