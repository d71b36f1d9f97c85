"""What came of a comparison: scores, curves, costs, and the figures that users decide by.

Costs of an arm on a task are means over its seeds (`own`), what tuning took once (`tuning`), and what all tasks and
seeds share (`shared`): the pretraining up to the checkpoint in question; of TLM the corpus store and its index.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np

from tasks.errors import InputError
from tlm.compare import PRETRAINED, Arm, Study
from tlm.curves import read_metrics
from tlm.ledger import SUMMED, add_costs
from tlm.run import read_json
from tlm.statistics import Answers, mean_sd

SHARED_PHASES = ("corpus", "retrieval_index")  # of a run's seconds, made once for all tasks and seeds


class Point(NamedTuple):
    """Dev score, mean and standard deviation over seeds, after so many FLOPs, shared ones included."""

    flops: float
    score: float
    spread: float


@dataclass(frozen=True)
class Result:
    """An arm on a task. `folders`, `summaries`: its finished final runs, one a seed."""

    arm: Arm
    task: str
    metric: str
    folders: list[Path]
    summaries: list[dict]
    chosen: tuple[str, ...] | None
    own: dict
    tuning: dict
    shared: dict
    curve: list[Point]

    def scores(self, split: str = "test") -> list[float]:
        return [summary[split][self.metric] for summary in self.summaries]

    @property
    def flops(self) -> float:
        """Of a run with all that it stands on."""
        return self.own["flops"] + self.shared["flops"]


def collect(study: Study) -> list[Result]:
    """What has finished, arm by arm on each task. Raises InputError where runs were made from different data."""
    results = []
    for task in study.tasks:
        of_task = [result_of(study, arm, task) for arm in study.arms]
        refuse_other_data(study, task, of_task)
        results += of_task
    return results


def result_of(study: Study, arm: Arm, task: str) -> Result:
    _, _, start = study.starts(arm, task, 0)
    blocked = arm.kind in PRETRAINED and start is None
    tuned, chosen = ([], None) if blocked else study.tuning(arm, task)
    runs = study.finals(arm, task, chosen)[1] if chosen is not None else []
    runs = [run for run in runs if run.finished]
    summaries = [read_json(run.folder / "summary.json") for run in runs]
    pretraining = last_checkpoint(study) if arm.kind in PRETRAINED and runs else None
    shared = read_json(pretraining / "cost.json") if pretraining else add_costs([])
    extra = []
    if arm.kind == "pt-ft+tapt":
        extra = [
            read_json(study.tapt(task, run.seed, study.pretraining()[1][-1]).folder / "summary.json") for run in runs
        ]
    own = mean_cost([summary["cost"] for summary in summaries])
    own = add_costs([own, mean_cost([summary["cost"] for summary in extra])]) if extra else own
    if arm.kind == "tlm":
        own, shared = split(own)
    tuning = add_costs([read_json(run.folder / "summary.json")["cost"] for run in tuned if run.finished])
    metric = study.open(task).metric
    curve = []
    if summaries and arm.kind == "pt-ft":
        curve = pretraining_curve(study, arm, task, chosen, metric, shared, own, summaries)
    elif summaries and arm.kind != "tfidf":
        curve = training_curve([read_metrics(run.folder) for run in runs], metric, shared["flops"])
    return Result(arm, task, metric, [run.folder for run in runs], summaries, chosen, own, tuning, shared, curve)


def last_checkpoint(study: Study) -> Path:
    return study.pretraining()[1][-1].folder / "model"


def mean_cost(costs: Sequence[dict]) -> dict:
    """As `add_costs`, but the mean; of none all zero."""
    total, count = add_costs(costs), max(1, len(costs))
    return total | {name: total[name] / count for name in SUMMED} | {
        "seconds": {phase: seconds / count for phase, seconds in total["seconds"].items()}
    }  # fmt: skip


def split(cost: dict) -> tuple[dict, dict]:
    """A run's cost without the phases that all runs share, and that of these: seconds, and their part of the rest."""
    moved = {phase: s for phase, s in cost["seconds"].items() if phase in SHARED_PHASES}
    part = sum(moved.values()) / max(1e-9, sum(cost["seconds"].values()))
    shared = add_costs([]) | {name: part * cost[name] for name in ("energy_joules", "money")} | {"seconds": moved}
    own = cost | {name: cost[name] - shared[name] for name in ("energy_joules", "money")}
    return own | {"seconds": {p: s for p, s in cost["seconds"].items() if p not in moved}}, shared


def refuse_other_data(study: Study, task: str, results: Sequence[Result]) -> None:
    """Runs that read other files than the others, or than lie there now, are not to be compared."""
    seen = {i["path"]: (i["sha256"], "what lies there now") for i in study.open(task).inputs}
    for folder in (folder for result in results for folder in result.folders):
        for i in read_json(folder / "inputs.json"):
            if i["path"] == "tokenizer.json":
                continue
            sha, where = seen.setdefault(i["path"], (i["sha256"], str(folder)))
            if sha != i["sha256"]:
                raise InputError(
                    f"{folder}: was made from another {i['path']} (sha256 {i['sha256'][:12]}) than {where} "
                    f"({sha[:12]}); restore the file, or compare into another out="
                )


# --- curves ---------------------------------------------------------------------------------------------------------


def pretraining_curve(study, arm, task, chosen, metric, shared, own, summaries) -> list[Point]:
    """A point for each checkpoint whose runs have finished; the last is that of the final runs."""
    points = []
    for checkpoint, runs in study.curve(arm, task, chosen):
        found = [read_json(run.folder / "summary.json") for run in runs if run.finished]
        if found:
            before = read_json(checkpoint.folder / "model" / "cost.json")["flops"]
            flops = before + fmean(summary["cost"]["flops"] for summary in found)
            mean, sd = mean_sd([summary["dev"][metric] for summary in found])
            points.append(Point(flops, mean, sd or 0.0))
    mean, sd = mean_sd([summary["dev"][metric] for summary in summaries])
    return [*points, Point(shared["flops"] + own["flops"], mean, sd or 0.0)]


def training_curve(seeds: Sequence[Sequence[dict]], metric: str, before: float = 0.0) -> list[Point]:
    """The best dev score so far, at each of the scores on dev; a run that stopped early keeps its last."""
    paths = [best_so_far(records, metric) for records in seeds]
    longest = max(map(len, paths), default=0)
    paths = [path + path[-1:] * (longest - len(path)) for path in paths if path]
    points = []
    for at_once in zip(*paths, strict=True):
        mean, sd = mean_sd([score for _, score in at_once])
        points.append(Point(before + fmean(flops for flops, _ in at_once), mean, sd or 0.0))
    return points


def best_so_far(records: Sequence[dict], metric: str) -> list[tuple[float, float]]:
    """(FLOPs, best score) at each score on dev. A score's FLOPs are those of the log line of its step, or the next."""
    path, waiting, best, flops = [], 0, -math.inf, 0
    for record in records:
        if record["kind"] == "dev":
            best = max(best, record[metric])
            path.append([flops, best])
            waiting += 1
        elif record["kind"] == "train":
            flops = record["flops"]
            for entry in path[len(path) - waiting :]:
                entry[0] = flops
            waiting = 0
    return [(flops, score) for flops, score in path]


def score_at(curve: Sequence[Point], flops: float) -> float | None:
    """Of the curve at these FLOPs, in between by their logarithm; None outside of it."""
    if not curve or not curve[0].flops <= flops <= curve[-1].flops:
        return None
    return float(np.interp(math.log(flops), [math.log(p.flops) for p in curve], [p.score for p in curve]))


def flops_to(curve: Sequence[Point], score: float) -> float | None:
    """The least FLOPs at which the curve has the score, in between by their logarithm; None if it never has."""
    before = None
    for point in curve:
        if point.score >= score:
            if before is None or point.score == before.score:
                return point.flops
            share = (score - before.score) / (point.score - before.score)
            return math.exp(math.log(before.flops) + share * math.log(point.flops / before.flops))
        before = point
    return None


def mean_curve(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """Over tasks: the n-th points together, FLOPs by their geometric mean; as many as the shortest has."""
    shortest = min(map(len, curves), default=0)
    return [
        Point(
            math.exp(fmean(math.log(p.flops) for p in points)),
            fmean(p.score for p in points),
            math.sqrt(sum(p.spread**2 for p in points)) / len(points),
        )
        for points in zip(*(curve[:shortest] for curve in curves), strict=True)
    ]


# --- to decide by ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """An arm that starts from nothing beside pretrain-then-finetune, on a task; None: not reached, or not measured."""

    arm: str
    rival: str
    task: str
    flops: float  # of a run
    to_rival: float | None  # until its dev score reached the rival's last one
    ratio: float | None  # the rival's FLOPs over these
    rival_flops: float
    rival_flat: float  # of the rival, from which on its dev score is within a standard deviation of its last one
    rival_to_arm: float | None  # of the rival, until its dev score was the arm's
    rival_ratio: float | None  # these over the arm's
    rival_at_equal: float | None  # the rival's dev score at the arm's FLOPs
    score: float  # the arm's dev score
    rival_score: float
    break_even: float
    break_even_tuned: float


def decide(result: Result, rival: Result) -> Decision:
    to_rival = flops_to(result.curve, rival.curve[-1].score)
    rival_to_arm = flops_to(rival.curve, result.curve[-1].score)
    return Decision(
        arm=result.arm.name,
        rival=rival.arm.name,
        task=result.task,
        flops=result.flops,
        to_rival=to_rival,
        ratio=rival.flops / to_rival if to_rival else None,
        rival_flops=rival.flops,
        rival_flat=flat_from(rival.curve),
        rival_to_arm=rival_to_arm,
        rival_ratio=rival_to_arm / result.flops if rival_to_arm else None,
        rival_at_equal=score_at(rival.curve, result.flops),
        score=result.curve[-1].score,
        rival_score=rival.curve[-1].score,
        break_even=break_even(rival.shared["flops"], result.own["flops"], rival.own["flops"]),
        break_even_tuned=break_even(
            rival.shared["flops"],
            result.own["flops"] + result.tuning["flops"],
            rival.own["flops"] + rival.tuning["flops"],
        ),
    )


def flat_from(curve: Sequence[Point]) -> float:
    """FLOPs of the first point that is as good as the last, but for the last one's spread over seeds."""
    return next(p.flops for p in curve if p.score >= curve[-1].score - curve[-1].spread)


def break_even(pretraining: float, a_task: float, finetuning: float = 0.0) -> float:
    """The number of tasks for which pretraining once and finetuning for each costs as much as `a_task` for each.

    Infinite where finetuning alone costs more than `a_task`.
    """
    return pretraining / (a_task - finetuning) if a_task > finetuning else math.inf


# --- answers on test ------------------------------------------------------------------------------------------------


def read_answers(result: Result, labels: Sequence[str]) -> tuple[Answers, np.ndarray]:
    """(What the arm answered, its probabilities float64[S, N, C])."""
    number = {label: i for i, label in enumerate(labels)}
    gold, predicted, shares = [], [], []
    for folder in result.folders:
        lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
        gold.append([number[line["label"]] for line in lines])
        predicted.append([number[line["prediction"]] for line in lines])
        shares.append([[line["probabilities"][label] for label in labels] for line in lines])
    assert all(of_seed == gold[0] for of_seed in gold), "inputs.json is the same, so the test texts are"
    return Answers(np.array(gold[0]), np.array(predicted), len(labels), result.metric), np.array(shares)
