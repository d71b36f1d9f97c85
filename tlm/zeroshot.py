"""`tlm eval RUN pool=P`: a generative run on tasks of a pool that it has not seen.

Where a task has choices, the one counts that the model finds likeliest: by the sum of its tokens' log-likelihoods, per
byte of its text, or against its likelihood without a prompt (Brown et al. 2020, arXiv 2005.14165, section 2.4). All
choices of an instance stand side by side behind one prompt, whose states are so computed once (Batch.answers);
`each_alone` is the slow twin. Other tasks are answered by greedy generation.

Accuracies are normalised to (accuracy - chance) / (1 - chance), so that tasks of any number of choices compare. Where
labels are uneven, a model that always says the same may be far above chance by it. `balanced`, the mean over labels of
the share of each that is found (of tasks whose instances all have the same choices), is then at 0.
Intervals are bootstrapped over tasks, and over instances in each, which is cautious (see statistics.py).
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from tasks.errors import InputError
from tasks.metrics import GENERATED
from tasks.pool import Instance, Pool, PoolTask, open_pool
from tasks.prompts import Prompted
from tlm.batches import pack
from tlm.config import EvalConfig
from tlm.evaluate import batches_by_length
from tlm.generate import generate
from tlm.instances import open_instances, pool_sha256
from tlm.ledger import Ledger
from tlm.model import Transformer, forward_flops, load_model
from tlm.progress import Progress
from tlm.prompted import Reader, chosen_prompt, rendered
from tlm.run import read_json, write_json
from tlm.tokenizer import own_tokenizer

if TYPE_CHECKING:
    from tlm.biencoder import EncoderRun

RULES = ("sum", "byte", "unconditional", "head")  # the last: that of a bi-encoder, alone
BALANCED = "balanced"  # by the first rule, or of the prompt that was found
OF_PROMPTS = ("mean_prompt", "majority", "label_model", "own_prompt", "found_prompt")  # votes.py, search.py
ACCURACIES = (*RULES, BALANCED, *OF_PROMPTS)
RESAMPLES = 1000
AT_A_TIME = 1000  # instances


class Case(NamedTuple):
    """A prompt, int64[p], and answers to it, int64[a] each."""

    prompt: np.ndarray
    answers: list[np.ndarray]


@torch.no_grad()
def log_likelihoods(model: Transformer, cases: Sequence[Case], ledger: Ledger | None = None) -> list[np.ndarray]:
    """Of each case log P(answer | prompt) by answer, float64[answers]. `model` is in evaluation mode. `ledger` is told
    what it cost."""
    inputs = [np.concatenate([c.prompt, *(a[:-1] for a in c.answers)]) for c in cases]
    result = [np.zeros(len(case.answers)) for case in cases]
    for part in batches_by_length(np.array([len(tokens) for tokens in inputs])):
        sides = [tuple(len(a) - 1 for a in cases[i].answers if len(a) > 1) for i in part]
        batch = pack([inputs[i] for i in part], answers=sides).to(next(model.parameters()).device)
        starts = batch.borders[batch.slots.cpu()].tolist()
        asked, places, targets, owners = [], [], [], []  # the positions that predict; which of them predicts what
        for i, start in zip(part, starts, strict=True):
            prompt, answers = cases[i]
            first = len(asked)
            asked += range(start + len(prompt) - 1, start + len(inputs[i]))
            after = first + 1
            for number, answer in enumerate(answers):
                places += [first, *range(after, after + len(answer) - 1)]
                after += len(answer) - 1
                targets += answer.tolist()
                owners += [(i, number)] * len(answer)
        states = model(batch)[torch.tensor(asked)]
        log_p = model.mlm_logits(states)[: len(asked)].float().log_softmax(-1)
        found = log_p[torch.tensor(places), torch.tensor(targets)].double().tolist()
        for (i, number), value in zip(owners, found, strict=True):
            result[i][number] += value
        if ledger:
            attended = batch.under(model.shape.attention).attended
            ledger.flops += forward_flops(model.shape, batch.lengths, len(asked), attended=attended)
            ledger.tokens += len(batch.tokens)
    return result


def each_alone(model: Transformer, cases: Sequence[Case]) -> list[np.ndarray]:
    """The same, every answer behind a prompt of its own."""
    alone = log_likelihoods(model, [Case(case.prompt, [answer]) for case in cases for answer in case.answers])
    ends = np.cumsum([len(case.answers) for case in cases])
    return np.split(np.concatenate(alone), ends[:-1]) if alone else []


@dataclass(frozen=True)
class Run:
    """A finished generative run. `seen`: tasks that it was trained on, with their categories."""

    folder: Path
    model: Transformer
    reader: Reader
    seen: dict[str, str]
    choices: str
    templates: int | None
    ledger: Ledger = field(default_factory=Ledger)  # what its scores have cost

    def prompted(self, instance: Instance, task: PoolTask) -> Prompted:
        return rendered(instance, chosen_prompt(instance, task, self.choices, self.templates))

    def choice_scores(
        self, prompted: Sequence[Prompted], tasks: Sequence[str], rules: Sequence[str] = RULES
    ) -> list[dict[str, np.ndarray]]:
        """Of each instance by rule the scores of its answers, float64[answers]."""
        cases = self.cases(prompted, tasks)
        sums = log_likelihoods(self.model, cases, self.ledger)
        found = {"sum": sums}
        if "byte" in rules:
            sizes = [np.array([max(1, len(answer.encode())) for answer in p.answers]) for p in prompted]
            found["byte"] = [total / num_bytes for total, num_bytes in zip(sums, sizes, strict=True)]
        if "unconditional" in rules:
            alone = self.unconditional(cases, tasks)
            found["unconditional"] = [total - without for total, without in zip(sums, alone, strict=True)]
        return [{rule: found[rule][i] for rule in rules if rule in found} for i in range(len(cases))]

    def cases(self, prompted: Sequence[Prompted], tasks: Sequence[str]) -> list[Case]:
        """The prompt has room for the longest of its answers."""
        texts = self.reader.encode([p.text for p in prompted])
        answers = iter(self.reader.answers([answer for p in prompted for answer in p.answers]))
        cases = []
        for text, p, task in zip(texts, prompted, tasks, strict=True):
            own = [next(answers) for _ in p.answers]
            cases.append(Case(self.reader.prompt(text, max(map(len, own)), task), own))
        return cases

    def unconditional(self, cases: Sequence[Case], tasks: Sequence[str]) -> list[np.ndarray]:
        """log P(answer) of each, behind a prompt without text; what stands in several cases is scored once."""
        keys = [[(self.reader.slot(task), answer.tobytes()) for answer in c.answers]
                for c, task in zip(cases, tasks, strict=True)]  # fmt: skip
        empty = np.zeros(0, np.int64)
        distinct = {
            key: Case(self.reader.prompt(empty, len(answer), task), [answer])
            for of_case, case, task in zip(keys, cases, tasks, strict=True)
            for key, answer in zip(of_case, case.answers, strict=True)
        }
        scores = log_likelihoods(self.model, list(distinct.values()), self.ledger)
        known = dict(zip(distinct, (float(score[0]) for score in scores), strict=True))
        return [np.array([known[key] for key in of_case]) for of_case in keys]


def open_run(path: str) -> "Run | EncoderRun":
    """Raises InputError if there is none, or it is of another kind or damaged."""
    folder = Path(path)
    if not (folder / "summary.json").exists():
        raise InputError(f"{folder}: holds no finished run (no summary.json); finish it by the command that began it")
    if not (folder / "model" / "pool.json").exists():
        raise InputError(f"{folder}: was not trained on a pool; name a run of `tlm pretrain`, or leave pool= out")
    shown = read_json(folder / "model" / "pool.json")
    if (folder / "model" / "encoder").exists():
        from tlm.biencoder import open_encoder_run

        return open_encoder_run(folder, shown)
    model = load_model(folder / "model")
    sha256 = read_json(folder / "summary.json").get("tokenizer_sha256")
    tokenizer = own_tokenizer(folder / "model" / "tokenizer.json", model.shape.vocabulary, sha256)
    slots = {task: number for number, task in enumerate(shown["tasks"], 1)}
    reader = Reader(tokenizer, model.shape.max_length, shown["soft"], slots)
    return Run(folder, model, reader, shown["seen"], shown["choices"], shown["templates"])


def refuse_seen(run: Run, pool: Pool, tasks: Sequence[PoolTask]) -> None:
    """Raises InputError, with the names, if a category has trained."""
    if trained := sorted({task.category for task in tasks} & set(run.seen.values())):
        raise InputError(
            f"{run.folder}: was trained on {', '.join(trained)}, so its scores there are not zero-shot; leave them out "
            "of categories=, or set seen=true"
        )


def with_choices(
    pool: Pool, tasks: Sequence[PoolTask], categories: Sequence[str], progress: Progress
) -> list[PoolTask]:
    """Those of the tasks that have choices. Raises InputError where none has."""
    found = [task for task in tasks if task.format == "choice"]
    if not found:
        raise InputError(f"{pool.path}: no task of {', '.join(categories)} has choices; name other categories")
    if len(found) < len(tasks):
        progress.say(f"tasks without choices, which are left out: {len(tasks) - len(found)}")
    return found


@dataclass
class Found:
    """Of one task: scores by instance, float64[n] a measure, and the chance of a random choice (0 without choices)."""

    task: PoolTask
    values: dict[str, list[float]] = field(default_factory=dict)
    chances: list[float] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    choices: set[frozenset[str]] = field(default_factory=set)

    def add(self, scores: dict[str, float], chance: float, instance: Instance | None = None) -> None:
        for name, score in scores.items():
            self.values.setdefault(name, []).append(score)
        self.chances.append(chance)
        if instance and instance.choices:
            self.labels.append(instance.target)
            self.choices.add(frozenset(instance.choices))

    def balance(self, names: Sequence[str] = RULES) -> None:
        """Adds the accuracy in which each label that occurs counts alike, where the choices are always the same; of the
        first measure of `names` that is there."""
        labels = Counter(self.labels)
        right = next((self.values[name] for name in names if name in self.values), [])
        if len(self.choices) == 1 and len(labels) > 1 and len(right) == len(self.labels):
            weights = [len(self.labels) / len(labels) / labels[label] for label in self.labels]
            self.values[BALANCED] = [w * r for w, r in zip(weights, right, strict=True)]

    def chance(self, name: str) -> float:
        """Of the measure; of `balanced` that of always saying the same."""
        return 1 / len(set(self.labels)) if name == BALANCED else float(np.mean(self.chances))


def evaluate_pool(names: Sequence[str], config: EvalConfig) -> int:
    """Prints a table for each run and writes RUN/zeroshot.json, or RUN/votes.json."""
    from rich.console import Console

    from tlm.votes import voted

    pool = open_pool(config.pool)
    tasks = pool.select(config.categories)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    runs, progress = [open_run(name) for name in names], Progress()
    for run in runs:
        if not config.seen:
            refuse_seen(run, pool, tasks)
    only_choices = bool(config.votes) or not all(isinstance(run, Run) for run in runs)
    if only_choices and (config.by == "generation" or config.twin):
        raise InputError("by=generation, twin=: a bi-encoder, or votes=, only scores choices; leave them out")
    if only_choices or config.by == "choices":
        tasks = with_choices(pool, tasks, config.categories, progress)
    sha256 = pool_sha256(pool)
    with progress.phase("pool"):
        instances = open_instances(pool, sha256, Path(config.cache).expanduser(), progress.update)
    found = [some(instances.rows(task.name, "test"), config.limit) for task in tasks]
    rows = np.concatenate([np.empty(0, np.int64), *found])
    if not len(rows):
        raise InputError(f"{pool.path}: no task of {', '.join(config.categories)} has test instances; name others")
    way, file = (voted, "votes.json") if config.votes else (scored, "zeroshot.json")
    if config.votes and not find_spec("snorkel"):
        progress.say("without snorkel there is no LabelModel; get it by pip install -c constraints.txt -e '.[ama]'")
    for run in runs:
        with progress.phase("scores"):
            scores, seconds = way(run, pool, instances, rows, config, progress.update)
        result = {
            "run": str(run.folder), "pool": {"path": pool.path, "sha256": sha256}, "categories": config.categories,
            "limit": config.limit, "instances": len(rows), "seconds": round(seconds, 1), "flops": run.ledger.flops,
            "tokens": run.ledger.tokens, **({"votes": config.votes} if config.votes else {}), **summary(scores),
        }  # fmt: skip
        if config.twin:
            result["twin"] = against_twin(run, pool, [instances[row] for row in rows], config.twin)
        write_json(run.folder / file, result)
        Console().print(table(result))
        print(run.folder / file)
    return 0


def some(rows: np.ndarray, limit: int | None) -> np.ndarray:
    """At most `limit` of the rows, drawn alike for all runs."""
    return rows if limit is None else np.sort(np.random.default_rng(0).permutation(rows)[:limit])


def scored(
    run: Run, pool: Pool, instances, rows: np.ndarray, config: EvalConfig, update: Callable
) -> tuple[list[Found], float]:
    """Every task's scores, and the seconds of scoring alone."""
    found: dict[str, Found] = {}
    start = time.perf_counter()
    for begin in range(0, len(rows), AT_A_TIME):
        chunk = [instances[row] for row in rows[begin : begin + AT_A_TIME]]
        for choosing in (True, False):
            part = [i for i in chunk if (i.choices is not None and config.by != "generation") == choosing]
            scores = (by_choice if choosing else by_generation)(run, pool, part, config) if part else ()
            for instance, of_one, chance in scores:
                found.setdefault(instance.task, Found(pool.tasks[instance.task])).add(of_one, chance, instance)
        update(begin + len(chunk), len(rows), "instances")
    for of_task in found.values():
        of_task.balance()
    return list(found.values()), time.perf_counter() - start


def by_choice(run: Run, pool: Pool, instances: Sequence[Instance], config: EvalConfig):
    """(instance, whether each rule chooses right, the chance of doing so)"""
    tasks = [instance.task for instance in instances]
    prompted = [run.prompted(instance, pool.tasks[instance.task]) for instance in instances]
    for instance, p, by_rule in zip(instances, prompted, run.choice_scores(prompted, tasks), strict=True):
        yield instance, {rule: float(s.argmax() == p.gold) for rule, s in by_rule.items()}, 1 / len(p.answers)


def by_generation(run: Run, pool: Pool, instances: Sequence[Instance], config: EvalConfig):
    """(instance, every measure of what is said, 0). The right answer is compared as the tokenizer hands it back."""
    prompted = [run.prompted(instance, pool.tasks[instance.task]) for instance in instances]
    most = min(config.answer_tokens, run.reader.most_answer)
    texts = run.reader.encode([p.text for p in prompted])
    prompts = [run.reader.prompt(t, most, i.task) for t, i in zip(texts, instances, strict=True)]
    said, wanted = generate(run.model, prompts, most), run.reader.encode([p.answers[p.gold] for p in prompted])
    for instance, ours, theirs in zip(instances, said, wanted, strict=True):
        pair = [run.reader.tokenizer.decode(ids.tolist()) for ids in (ours, theirs)]
        yield instance, {name: measure(*pair) for name, measure in GENERATED.items()}, 0.0


def summary(found: Sequence[Found]) -> dict:
    """Means with their intervals: of all tasks, by category, family and task; choices and generated apart."""
    rng = np.random.default_rng(0)
    drawn = {(f.task.name, name): resampled(f, name, rng) for f in found for name in f.values}

    def group(members: Sequence[Found], name: str) -> dict:
        own = [f for f in members if name in f.values]
        means, chances = np.array([np.mean(f.values[name]) for f in own]), np.array([f.chance(name) for f in own])
        resamples = np.stack([drawn[f.task.name, name] for f in own], 1)  # [RESAMPLES, tasks]
        if len(own) > 1:
            picked = rng.integers(len(own), size=resamples.shape)
            resamples, of_picked = np.take_along_axis(resamples, picked, 1), chances[picked]
        else:
            of_picked = chances[None]
        result = {"tasks": len(own), "instances": sum(len(f.values[name]) for f in own), "mean": float(means.mean())}
        if name in ACCURACIES:
            result |= {"chance": float(chances.mean()), "normalised": float(normalised(means, chances).mean())}
        spread = (normalised(resamples, of_picked) if name in ACCURACIES else resamples).mean(1)
        return result | {"interval": [float(x) for x in np.percentile(spread, [2.5, 97.5])]}

    def groups(key: Callable[[Found], str]) -> dict:
        by: dict[str, list[Found]] = {}
        for f in found:
            by.setdefault(key(f), []).append(f)
        return {name: every(members) for name, members in sorted(by.items())}

    def every(members: Sequence[Found]) -> dict:
        names = dict.fromkeys((*ACCURACIES, *GENERATED, *(name for f in members for name in f.values)))
        return {name: group(members, name) for name in names if any(name in f.values for f in members)}

    return {
        "all": every(found),
        "by_category": groups(lambda f: f.task.category),
        "by_family": groups(lambda f: f.task.family),
        "by_task": groups(lambda f: f.task.name),
    }


def resampled(of_task: Found, name: str, rng: np.random.Generator) -> np.ndarray:
    """Means of bootstrap samples, float64[RESAMPLES]."""
    values = np.array(of_task.values[name])
    if name == BALANCED:  # within each label, so that all of them occur in each sample
        labels = np.array(of_task.labels)
        return np.mean([binomial(values[labels == label] > 0, rng) for label in dict.fromkeys(of_task.labels)], axis=0)
    if np.isin(values, (0, 1)).all():
        return binomial(values, rng)
    return values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)


def binomial(rights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shares of what is right in bootstrap samples of it, float64[RESAMPLES]."""
    return rng.binomial(len(rights), rights.mean(), RESAMPLES) / len(rights)


def normalised(accuracy: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """0 at chance, 1 where all is right; 0 where there is but one choice."""
    return np.where(chance < 1, (accuracy - chance) / np.where(chance < 1, 1 - chance, 1), 0)


def against_twin(run: Run, pool: Pool, instances: Sequence[Instance], number: int) -> dict:
    """Both ways of scoring the choices of `number` instances: how far they are apart, and how long they take. The twin
    packs its prompts as we do; `one_by_one` hands the model one answer at a time, as a loop over choices does."""
    some = [i for i in instances if i.choices]
    some = [some[i] for i in np.linspace(0, len(some) - 1, min(number, len(some))).astype(int)]
    cases = run.cases([run.prompted(i, pool.tasks[i.task]) for i in some], [i.task for i in some])
    ways = {
        "ours": lambda: log_likelihoods(run.model, cases),
        "each_alone": lambda: each_alone(run.model, cases),
        "one_by_one": lambda: [log_likelihoods(run.model, [Case(c.prompt, [a])])[0] for c in cases for a in c.answers],
    }
    seconds, scores = {}, {}
    for name, way in ways.items():
        start = time.process_time()  # other work on the machine plays no part
        scores[name] = np.concatenate(way())
        seconds[name] = time.process_time() - start
    choices = len(scores["ours"])
    return {
        "instances": len(some),
        "choices": choices,
        "largest_difference": float(np.abs(scores["ours"] - scores["each_alone"]).max()),
        "choices_per_second": {name: round(choices / s, 1) for name, s in seconds.items()},
        "times_faster": {name: round(seconds[name] / seconds["ours"], 2) for name in ways if name != "ours"},
    }


def table(result: dict):
    from rich.table import Table

    names = list(result["all"])
    table = Table(title=f"{result['run']} on {', '.join(result['categories'])}", title_justify="left", box=None)
    for head in ("category", "tasks", *names):
        table.add_column(head, justify="left" if head == "category" else "right")
    for category, scores in [*result["by_category"].items(), ("all", result["all"])]:
        table.add_row(category, str(max(s["tasks"] for s in scores.values())), *(cell(scores.get(n)) for n in names))
    table.caption = (
        f"percent; {', '.join(n for n in ACCURACIES if n in names)}: accuracy of choices over chance, "
        "(accuracy - chance) / (1 - chance); balanced: each label of a task counts alike; gain: points of accuracy "
        "over the mean prompt; after ± half the 95% interval, over tasks and instances"
    )
    return table


def cell(score: dict | None) -> str:
    if score is None:
        return "-"
    low, high = score["interval"]
    return f"{100 * score.get('normalised', score['mean']):.1f} ± {50 * (high - low):.1f}"
