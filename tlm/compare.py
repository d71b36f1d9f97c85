"""`tlm compare`: arms over seeds and tasks at equal FLOPs, pretrain-then-finetune among them. Its rules:

- An arm is NAME or NAME:WHAT[:WHAT ...], where WHAT is a selector (of tlm) or key=value of `tlm train`, which that arm
  alone has: `tlm:random`, `tlm:joint.mlm_weight=0` (no rho2), `tlm:joint.external_per_task=0` (no external text),
  `tlm:finetune.share=0` (no stage two), `tlm:retrieval.k=50`. All else is alike, `settings` included.
- tlm and scratch are what `tlm train budget=` makes of `budget`. pt-ft is masked LM of the same model on the whole
  corpus, once for all tasks and seeds, then finetuning on as many batches of the task as both stages of tlm read.
  Checkpoints lie on one long pretraining at a constant rate (the trunk); each is cooled down by a branch of its own
  over the last COOLING of its steps, as the trapezoid of the other arms is, so that each is what a pretraining planned
  for its length would be (Haegele et al. 2024, arXiv 2405.18392).
- pt-ft+tapt has masked LM on the task's training texts in between, as many steps as finetuning; hf:FOLDER finetunes a
  checkpoint of transformers, for as many steps as pt-ft.
- Tuning: `tries` settings by successive halving on dev, seed 0. The first is the recipe's own. Each rung may spend the
  FLOPs of one run in all, and half of its settings go on.
- Test is read once an arm and seed, by the runs that come last. The curve of pt-ft over its checkpoints is on dev.

Runs are ordinary run folders, queued over processes of one thread. What has finished is not done again, what has failed
does not keep the others: the same command goes on.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path

from tasks.errors import InputError
from tlm.config import CHOICES, CompareConfig, TrainConfig, load, rows_of, validate
from tlm.jobs import Planned, check_settings, planned, queue, settings_of, task_name, tasks_by_name
from tlm.ledger import Ledger
from tlm.plan import fitted, length_for, stage_costs, steps_between_scores, within_budget
from tlm.prepare import NO_TASK, leaks_by_task, open_corpus, open_task
from tlm.progress import Progress
from tlm.run import read_json, write_text

KINDS = ("tfidf", "scratch", "tlm", "pt-ft", "pt-ft+tapt", "hf")
PRETRAINED = ("pt-ft", "pt-ft+tapt")
FIXED = ("task", "corpus", "run", "out", "cache", "seed", "threads", "test", "init_from", "unseen", "joint.keep_at")
BUDGETED = ("budget", "joint.steps", "finetune.steps")
COOLING = 0.6  # share of the steps in which the trapezoid falls
SPACING = 4  # of the checkpoints' FLOPs
# With the 30 to 44 batches that tlm reads of 50 labelled texts, finetuning has not begun to learn (runs/README.md).
LEAST_STEPS = 200
# What is tuned: keys and the values tried beside the recipe's own. The paper chose rho1 and rho2 by dev as well.
GRIDS = {
    "scratch": {"joint.mlm_weight": (1.0, 20.0), "model.dropout": (0.0, 0.1)},
    "tlm": {"joint.mlm_weight": (1.0, 20.0), "model.dropout": (0.0, 0.1)},
    "pt-ft": {"finetune.lr": (1e-3, 3e-4), "finetune.matrix_lr": (3e-3, 1e-3)},
    "pt-ft+tapt": {"finetune.lr": (1e-3, 3e-4), "finetune.matrix_lr": (3e-3, 1e-3)},
    "hf": {"finetune.lr": (5e-5, 2e-5, 1e-4, 3e-4)},
}


@dataclass(frozen=True)
class Arm:
    name: str  # as it was given
    kind: str
    settings: tuple[str, ...]

    @property
    def slug(self) -> str:
        """The name as part of a folder's."""
        return re.sub(r"[^\w.=+-]+", "_", self.name).strip("_")


def parse_arm(name: str) -> Arm:
    """Raises InputError if there is no such arm."""
    if name.startswith("hf:"):
        if not (Path(name[3:]) / "config.json").exists():
            raise InputError(f"arms=[{name}]: no checkpoint of transformers there (no config.json); name its folder")
        return Arm(name, "hf", (f"init_from={name}",))
    kind, *changes = name.split(":")
    if kind not in KINDS or kind == "hf":
        raise InputError(f"arms=[{name}]: no such arm; use one of {', '.join(KINDS[:-1])}, tlm:SELECTOR or hf:FOLDER")
    if kind == "tfidf" and changes:
        raise InputError(f"arms=[{name}]: tfidf has nothing to change; write tfidf")
    settings = []
    for change in changes:
        key, equals, _ = change.partition("=")
        selectors = CHOICES["retrieval.selector"]
        if not equals and not (kind == "tlm" and change in selectors):
            raise InputError(
                f"arms=[{name}]: {change} is neither key=value nor a selector of tlm ({', '.join(selectors)})"
            )
        if key in BUDGETED:
            raise InputError(
                f"arms=[{name}]: {key} follows from budget; finetune.share=S gives stage two a share of it"
            )
        if key in FIXED or key.split(".")[0] == "data":
            raise InputError(f"arms=[{name}]: {key} is alike for all arms; leave it out")
        settings.append(change if equals else f"retrieval.selector={change}")
    return Arm(name, kind, tuple(settings))


@dataclass
class Study:
    """What is asked, and which runs that needs: `plan` says which can be made by now."""

    config: CompareConfig
    arms: list[Arm]
    tasks: dict[str, str]  # name -> what was given
    progress: Progress
    failed: dict[Path, str] = field(default_factory=dict)

    def __post_init__(self):
        self.folder = Path(self.config.out)
        # The plan is asked for after each run, and a run's configuration is dear to check.
        self.open = cache(lambda name: open_task(self.tasks[name], self.train(name, ()).data))
        self.planned, self.finetuning, self.rungs = cache(planned), cache(self.finetuning), cache(self.rungs)
        self.candidates, self.pretraining = cache(self.candidates), cache(self.pretraining)

    # --- settings -----------------------------------------------------------------------------------------------

    def common(self, task: str | None) -> list[str]:
        """What all arms have; `task` None: the pretraining's, which knows no task."""
        given = ["boards=[]", "keep_checkpoints=1", f"price_per_hour={self.config.price_per_hour}"]
        return [*given, *settings_of(self.config.settings, task), f"cache={self.config.cache}", "threads=1"]

    def train(self, task: str | None, settings: Sequence[str], corpus: bool = True) -> TrainConfig:
        """The configuration that these settings lead to."""
        given = [f"task={self.tasks[task] if task else 'none'}", *self.common(task), *settings]
        return validate(load(TrainConfig, [*given, f"corpus={self.config.corpus}"] if corpus else given))

    def finetuning(self, task: str) -> tuple[int, float]:
        """(Steps, about the FLOPs) of a pretrained model's finetuning: as many batches as tlm reads, or more."""
        tlm = fitted(self.train(task, (f"budget={self.config.budget}",)), self.open(task))
        read = round(tlm.joint.steps / (tlm.joint.external_per_task + 1)) + tlm.finetune.steps
        steps = max(read, LEAST_STEPS)
        config = replace(tlm, finetune=replace(tlm.finetune, steps=steps))
        return steps, stage_costs(config, self.open(task))["finetune"].flops

    def run(self, name: str, task: str | None, seed: int, settings: Sequence[str], flops: float) -> Planned:
        """The run OUT/NAME; `settings` in the words of `tlm train`."""
        path = self.folder / name
        given = [f"task={self.tasks[task] if task else 'none'}", *self.common(task), *settings]
        given += [f"seed={seed}", f"out={path.parent}", f"run={path.name}"]
        return self.planned(task or "none", seed, path, tuple(given), flops)

    # --- the pretraining ----------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> list[float]:
        """FLOPs of each, the smallest first."""
        most = self.config.pretraining * self.config.budget
        return [most / SPACING**k for k in reversed(range(self.config.checkpoints))]

    def pretraining(self) -> tuple[Planned, list[Planned]]:
        """The trunk, and for each checkpoint the branch that cools it down."""
        config = self.train(None, ())
        unseen = sorted({*self.tasks.values(), *self.config.unseen})
        length = max(length_for(config.model, open_task(name, config.data)) for name in unseen)
        config = replace(config, model=replace(config.model, max_length=length))
        steps = [within_budget(replace(config, budget=flops), NO_TASK).joint.steps for flops in self.checkpoints]
        places = [max(1, round((1 - COOLING) * number)) for number in steps]
        base = Path(self.config.pretrained or self.folder / "pretraining")
        both = ["joint.eval_every=0", f"corpus={self.config.corpus}", f"unseen={json.dumps(unseen)}"]
        both.append(f"model.max_length={length}")
        given = [f"joint.steps={places[-1]}", "joint.schedule=constant", f"joint.keep_at={json.dumps(places)}"]
        trunk = self.run_at(base / "trunk", [*both, *given], (1 - COOLING) * self.checkpoints[-1])
        branches = []
        for number, place, flops in zip(steps, places, self.checkpoints, strict=True):
            given = [
                f"joint.steps={number - place}",
                "joint.schedule=linear",
                f"init_from={trunk.folder}/at-{place:06d}",
            ]
            # another seed: not the trunk's first batches once more
            branches.append(self.run_at(base / f"cooled-{number:06d}", [*both, *given], COOLING * flops, seed=number))
        return trunk, branches

    def run_at(self, path: Path, settings: Sequence[str], flops: float, seed: int = 0) -> Planned:
        given = ["task=none", *self.common(None), *settings, f"seed={seed}", f"out={path.parent}", f"run={path.name}"]
        return self.planned("none", seed, path, tuple(given), flops)

    # --- an arm on a task ---------------------------------------------------------------------------------------

    def candidates(self, arm: Arm, task: str) -> list[tuple[str, ...]]:
        """Settings to choose from; the recipe's own are the first. What the arm fixes is not tuned."""
        grid = GRIDS.get(arm.kind, {})
        own = {key: value for key, _, value, _ in rows_of(self.train(task, arm.settings, corpus=arm.kind != "scratch"))}
        free = {key: values for key, values in grid.items() if not any(s.startswith(f"{key}=") for s in arm.settings)}
        if "finetune.share=0" in arm.settings:
            free = {key: values for key, values in free.items() if not key.startswith("finetune.")}
        others = [
            tuple(f"{key}={value}" for key, value in zip(free, values, strict=True))
            for values in product(*free.values())
            if any(own[key] != value for key, value in zip(free, values, strict=True))
        ]
        first = () if arm.kind != "hf" else others.pop(0)  # the recipe's rates are for models from scratch
        return [first, *others][: self.config.tries]

    def full(self, arm: Arm, task: str) -> float:
        """FLOPs of a whole run of the arm, without what is shared."""
        return self.config.budget if arm.kind in ("tlm", "scratch") else self.finetuning(task)[1]

    def rungs(self, arm: Arm, task: str) -> list[tuple[int, float]]:
        """(How many settings are left, share of a whole run that each gets) of each rung of the tuning."""
        left, found = len(self.candidates(arm, task)), []
        while left > 1:
            found.append((left, min(1.0, self.config.budget / left / self.full(arm, task))))
            if found[-1][1] == 1.0:
                break
            left = math.ceil(left / 2)
        return found

    def make(self, arm: Arm, task: str, name: str, seed: int, chosen: tuple[str, ...], share: float = 1.0,
             start: Planned | None = None, test: bool = False) -> Planned:  # fmt: skip
        """A run of the arm on `share` of its FLOPs. `start`: the pretraining it begins with."""
        flops = share * self.full(arm, task)
        if start or arm.kind == "hf":
            steps = max(1, round(share * self.finetuning(task)[0]))
            given = [f"init_from={start.folder}/model"] if start else []
            given += ["joint.steps=0", f"finetune.steps={steps}"]
            given.append(f"finetune.eval_every={steps_between_scores(steps, last=True)}")
        else:
            given = [f"budget={flops}", *([f"corpus={self.config.corpus}"] if arm.kind == "tlm" else [])]
        given += [*arm.settings, *chosen, f"test={str(test).lower()}"]
        return self.run(f"{task}/{name}", task, seed, given, flops)

    def tapt(self, task: str, seed: int, start: Planned) -> Planned:
        """Masked LM on the task's training texts, from the pretraining on."""
        path = self.folder / task / "tapt.jsonl"
        if not path.exists():
            lines = (json.dumps({"id": e.id, "text": e.text, "source": task}) for e in self.open(task).splits["train"])
            write_text(path, "\n".join(lines) + "\n")
        (steps, flops), config = self.finetuning(task), self.train(task, ())
        given = [f"corpus={path}", f"init_from={start.folder}/model", f"joint.steps={steps}", "joint.schedule=linear"]
        given.append(f"model.max_length={length_for(config.model, self.open(task))}")
        return self.run(f"{task}/tapt-{seed}", None, seed, given, flops)

    def starts(self, arm: Arm, task: str, seed: int) -> tuple[list[Planned], list[Planned], Planned | None]:
        """(Runs to be made first, the pretraining's checkpoints, the start of this arm and seed, if it is there)."""
        if arm.kind not in PRETRAINED:
            return [], [], None
        trunk, branches = self.pretraining()
        ready = [b for b in branches if (Path(origin(b)) / "cost.json").exists()]
        first = [trunk, *ready]
        if not branches[-1].finished:
            return first, branches, None
        if arm.kind == "pt-ft":
            return first, branches, branches[-1]
        tapt = self.tapt(task, seed, branches[-1])
        return [*first, tapt], branches, tapt if tapt.finished else None

    def tuning(self, arm: Arm, task: str) -> tuple[list[Planned], tuple[str, ...] | None]:
        """(Runs of the tuning that can be made by now, the settings chosen, None before all of them are)."""
        left, runs = list(enumerate(self.candidates(arm, task))), []
        _, _, start = self.starts(arm, task, 0)
        for rung, (count, share) in enumerate(self.rungs(arm, task)):
            of_rung = [
                self.make(arm, task, f"tuning/{arm.slug}-{rung}-{number}", 0, chosen, share, start)
                for number, chosen in left
            ]
            runs += of_rung
            if not all(run.finished or run.folder in self.failed for run in of_rung):
                return runs, None
            scores = [self.dev_score(run) for run in of_rung]
            best = sorted(range(count), key=lambda i: -scores[i])[: math.ceil(count / 2) if share < 1 else 1]
            left = [left[i] for i in sorted(best)]
        return runs, left[0][1]

    def dev_score(self, run: Planned) -> float:
        """Worse than any where the run has failed."""
        if not run.finished:
            return -1.0
        summary = read_json(run.folder / "summary.json")
        return summary["dev"][summary["metric"]]

    def finals(self, arm: Arm, task: str, chosen: tuple[str, ...]) -> tuple[list[Planned], list[Planned]]:
        """(What has to be made before, the runs that read test): one a seed, one alone of TF-IDF."""
        if arm.kind == "tfidf":
            given = ["model.size=tfidf", "test=true"]
            return [], [self.run(f"{task}/tfidf-0", task, 0, given, 0.0)]
        before, runs = [], []
        for seed in range(self.config.seeds):
            first, _, start = self.starts(arm, task, seed)
            before += first
            if start or arm.kind not in PRETRAINED:
                runs.append(self.make(arm, task, f"{arm.slug}-{seed}", seed, chosen, start=start, test=True))
        return before, runs

    def curve(self, arm: Arm, task: str, chosen: tuple[str, ...]) -> list[tuple[Planned, list[Planned]]]:
        """(Checkpoint, the runs from it, one a seed) of pt-ft; those from the last one are the final ones."""
        if arm.kind != "pt-ft" or not self.config.curve:
            return []
        branches = self.pretraining()[1]
        return [
            (branch, [self.make(arm, task, f"{arm.slug}-at{number}-{seed}", seed, chosen, start=branch)
                      for seed in range(self.config.seeds)])
            for number, branch in enumerate(branches[:-1])
            if branch.finished
        ]  # fmt: skip

    def plan(self) -> list[Planned]:
        """All runs that are made, or can be made by now."""
        runs: dict[Path, Planned] = {}

        def add(new: Sequence[Planned]) -> None:
            runs.update((run.folder, run) for run in new)

        for task in self.tasks:
            for arm in self.arms:
                first, _, start = self.starts(arm, task, 0)
                add(first)
                if arm.kind in PRETRAINED and start is None:
                    continue
                tuned, chosen = self.tuning(arm, task)
                add(tuned)
                if chosen is not None:
                    before, finals = self.finals(arm, task, chosen)
                    add([*before, *finals])
                    for _, of_checkpoint in self.curve(arm, task, chosen):
                        add(of_checkpoint)
        return sorted(runs.values(), key=lambda run: -run.flops if run.task == "none" else 0)  # the long one first

    def check_budget(self) -> None:
        """Raises InputError where an arm, in its tuning or after it, would not take one step."""
        for arm, task in product(self.arms, self.tasks):
            shares = [1.0, *(share for _, share in self.rungs(arm, task))] if arm.kind != "tfidf" else []
            for share in shares:
                given = (*arm.settings, f"budget={share * self.config.budget}")
                config = self.train(task, given, corpus=arm.kind != "scratch")
                try:
                    enough = fitted(config, self.open(task)).finetune.steps or not config.finetune.share
                except InputError:
                    enough = False
                if not enough:
                    raise InputError(
                        f"budget={self.config.budget:g}: too small, {arm.name} on {task} would not take one step of "
                        f"each stage{f' in its tuning, which begins with {share:.0%} of it' if share < 1 else ''}; "
                        "raise it, or set tries=1"
                    )
        if any(arm.kind in PRETRAINED for arm in self.arms):
            try:
                self.pretraining()
            except InputError as error:
                raise InputError(f"pretraining={self.config.pretraining:g}, its first checkpoint: {error}") from None

    def flops(self) -> float:
        """Of all runs, those that cannot be planned yet included."""
        total = 0.0
        if any(arm.kind in PRETRAINED for arm in self.arms):
            trunk, branches = self.pretraining()
            total += trunk.flops + sum(branch.flops for branch in branches)
        for arm, task in product(self.arms, self.tasks):
            if arm.kind == "tfidf":
                continue
            tuning = sum(count * share for count, share in self.rungs(arm, task))
            points = {"pt-ft": self.config.checkpoints if self.config.curve else 1, "pt-ft+tapt": 2}.get(arm.kind, 1)
            total += self.full(arm, task) * (tuning + self.config.seeds * points)
        return total


def origin(run: Planned) -> str:
    """The folder that the run starts from."""
    return next(s.removeprefix("init_from=") for s in run.settings if s.startswith("init_from="))


def compare(config: CompareConfig) -> int:
    """Makes the runs that are missing and writes the report; exit status 1 if some failed."""
    from tlm.compare_report import report

    study = open_study(config)
    queue(study.plan(), config.jobs, study.progress, study.plan, study.failed, study.flops())
    report(study)
    return 1 if study.failed else 0


def open_study(config: CompareConfig) -> Study:
    """Raises InputError for all that is wrong with what was asked, before anything is run."""
    tasks = tasks_by_name(config.task)
    arms = [parse_arm(name) for name in config.arms]
    if twice := next((arm.name for arm in arms if [a.slug for a in arms].count(arm.slug) > 1), None):
        raise InputError(f"arms=[{twice}]: given twice; leave one out")
    check_settings("settings", config.settings, (*FIXED, *BUDGETED), list(tasks))
    study = Study(config, arms, tasks, Progress())
    for task in tasks:
        study.open(task)
    study.check_budget()
    refuse_leaks(study)
    return study


def refuse_leaks(study: Study) -> None:
    """Dev and test text in the corpus: a question to the user, since most would not think of it."""
    config = study.config
    where = Path(config.cache).expanduser()
    corpus = open_corpus(config.corpus, where, Ledger(), study.progress)
    with study.progress.phase("leaks"):
        data = study.train(next(iter(study.tasks)), ()).data
        found, _ = leaks_by_task(list(study.tasks.values()), data, corpus, where, 1, study.progress)
    leaks = {task_name(task): len(rows) for task, rows in found.items() if len(rows)}
    if leaks and config.leaks == "refuse":
        listed = ", ".join(f"{count} of {task}" for task, count in leaks.items())
        raise InputError(
            f"corpus={config.corpus}: holds documents with dev or test text ({listed}); leaks=drop leaves them out"
        )
