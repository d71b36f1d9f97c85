"""`tlm bench zeroprompt`: arms of `tlm pretrain` at equal FLOPs, scored zero-shot on categories they never saw.

An arm is `NAME word ...`, where a word is key=value of `tlm pretrain`, or one of these: `+corpus` (language modelling
of what the pool retrieves as well), `share=0.5` (of the budget; 0: untrained), `init_from=@ARM` (the model of another
arm's run of the same seed), `without=CATEGORY` (held out as well, and alone scored). The studies that ZeroPrompt made,
and some that it did not, are files in configs/zeroprompt/.

A score is accuracy over chance, (accuracy - chance) / (1 - chance), in the mean over tasks; its interval, and that of
the difference to the first arm, are of a bootstrap over tasks and seeds, both arms on the same tasks. Arms that train
on the same tasks, told in the same tokens, as models of several sizes do, are also compared by the FLOPs in which they
reach the loss on dev (of the tasks that train) that all of them reach.

Runs are ordinary run folders, queued over processes of one thread: what has finished is never done again, and the same
command goes on where it was stopped.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np

from tasks.errors import InputError
from tasks.pool import Pool, open_pool
from tlm.config import PretrainConfig, ZeropromptConfig, load
from tlm.curves import LIGHT, Ink, dress, read_metrics, render
from tlm.jobs import Planned, check_settings, planned, queue
from tlm.progress import Progress
from tlm.run import environment, read_json, write_bytes, write_json
from tlm.tables import short
from tlm.versus import Point, flops_to, training_curve
from tlm.zeroshot import BALANCED

FIXED = ("pool.path", "pool", "corpus", "run", "out", "cache", "seed", "threads", "budget")
RESAMPLES = 10_000
MOST_BARS = 12  # arms, above which there is but the table of categories


@dataclass(frozen=True)
class Arm:
    name: str
    settings: tuple[str, ...]
    corpus: bool = False
    share: float = 1.0
    origin: str | None = None  # the arm it starts from
    without: str | None = None  # a category held out beside the pool's own


def parse_arm(text: str) -> Arm:
    """Raises InputError for a word that is none."""
    name, *words = text.split() or [""]
    if not name or Path(name).name != name or "=" in name:
        raise InputError(f"arms=[{text}]: must begin with a plain name, as folders are called by it")
    arm = Arm(name, ())
    for word in words:
        key, equals, value = word.partition("=")
        if word == "+corpus":
            arm = replace(arm, corpus=True)
        elif not equals:
            raise InputError(f"arms=[{text}]: {word} is neither key=value nor +corpus")
        elif key == "share":
            arm = replace(arm, share=share_of(value, text))
        elif key == "init_from" and value.startswith("@"):
            arm = replace(arm, origin=value[1:])
        elif key == "without":
            arm = replace(arm, without=value)
        elif key in FIXED:
            raise InputError(f"arms=[{text}]: {key} is the bench's to set; leave it out")
        else:
            load(PretrainConfig, [word])  # raises for an unknown key
            arm = replace(arm, settings=(*arm.settings, word))
    return arm


def share_of(value: str, arm: str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise InputError(f"arms=[{arm}]: share={value} must be a share of the budget, from 0 to 1")
    return share


def bench(config: ZeropromptConfig) -> int:
    pool = open_pool(config.pool)
    arms = check(config, pool)
    progress, folder = Progress(), Path(config.out) / config.name
    runs: dict[tuple[str, int], Planned] = {}
    for stage in in_turn(arms):  # arms that others start from come first
        runs |= {(arm.name, seed): planned_run(config, pool, arm, seed) for seed in range(config.seeds)
                 for arm in stage}  # fmt: skip
        queue(list(runs.values()), config.jobs, progress)
    shown = [arm for arm in arms if arm.name not in {a.origin for a in arms}]
    queue([scoring(config, runs[arm.name, seed], arm) for seed in range(config.seeds) for arm in shown],
          config.jobs, progress)  # fmt: skip

    results = {arm.name: [result(runs[arm.name, seed], config.rule) for seed in range(config.seeds)] for arm in shown}
    category_of = {name: task.category for name, task in pool.tasks.items()}
    found = {name: figures(results[name], results[shown[0].name], category_of) for name in results}
    folders = {arm.name: [runs[arm.name, seed].folder for seed in range(config.seeds)] for arm in shown}
    learning = side_by_side({name: loss_curve(map(read_metrics, of)) for name, of in folders.items()},
                            {name: task_set(of) for name, of in folders.items()})  # fmt: skip
    summary = {
        "name": config.name, "budget": config.budget, "categories": config.categories, "limit": config.limit,
        "rule": config.rule, "settings": config.settings, "arms": list(config.arms), "machine": environment(),
        "code": sorted({str(read_json(run.folder / "env.json")["git_commit"]) for run in runs.values()}),
        "scores": found, "learning": learning, "runs": results,
    }  # fmt: skip
    write_json(folder / f"{config.name}.json", summary)
    write_bytes(folder / f"{config.name}.png", picture(config, found))
    show(config, found, learning)
    print(folder / f"{config.name}.json")
    return 0


def check(config: ZeropromptConfig, pool: Pool) -> list[Arm]:
    """Raises InputError, before anything is run."""
    arms = [parse_arm(text) for text in config.arms]
    names = [arm.name for arm in arms]
    if not arms:
        raise InputError("arms=[]: nothing to run; give arms, or a file of configs/ that lists them")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"arms=: {twice} is listed twice; name arms apart")
    for arm in arms:
        if arm.corpus and not config.corpus:
            raise InputError(f"arms=[{arm.name}]: asks for +corpus, and corpus= is missing")
        if arm.origin and (arm.origin not in names or arm.origin == arm.name):
            raise InputError(f"arms=[{arm.name}]: starts from @{arm.origin}, which is no other arm")
        if arm.origin and arms[names.index(arm.origin)].origin:
            raise InputError(f"arms=[{arm.name}]: starts from @{arm.origin}, which starts from another; one is allowed")
    pool.select([*config.categories, *filter(None, (arm.without for arm in arms))])  # raises
    check_settings("settings", config.settings, FIXED)
    return arms


def in_turn(arms: Sequence[Arm]) -> list[list[Arm]]:
    return [of for of in ([a for a in arms if not a.origin], [a for a in arms if a.origin]) if of]


def planned_run(config: ZeropromptConfig, pool: Pool, arm: Arm, seed: int) -> Planned:
    name, flops, folder = f"{arm.name}-{seed}", arm.share * config.budget, Path(config.out) / config.name
    given = [f"pool.path={config.pool}", "boards=[]", "keep_checkpoints=1", *config.settings, *arm.settings]
    given += [f"corpus={config.corpus}"] if arm.corpus else []
    given += [f"init_from={folder / f'{arm.origin}-{seed}'}/model"] if arm.origin else []
    given += [f"pool.heldout=[{','.join((*pool.sides['heldout'], arm.without))}]"] if arm.without else []
    given += [f"seed={seed}", f"out={folder}", f"run={name}", f"cache={config.cache}", "threads=1"]
    given.append(f"budget={flops}" if flops else "joint.steps=0")
    return planned(arm.name, seed, folder / name, given, flops, verb="pretrain")


def scoring(config: ZeropromptConfig, run: Planned, arm: Arm) -> Planned:
    """`tlm eval` of the run, unless its scores of these categories are there."""
    categories = [arm.without] if arm.without else config.categories
    file = run.folder / "zeroshot.json"
    if file.exists():
        old = read_json(file)
        if (old["categories"], old["limit"]) != (categories, config.limit):
            file.unlink()
    given = [str(run.folder), f"pool={config.pool}", f"categories=[{','.join(categories)}]", "threads=1"]
    given += [f"limit={config.limit}"] if config.limit else []
    return Planned(arm.name, run.seed, run.folder, [*given, f"cache={config.cache}"], verb="eval", file=file.name)


def result(run: Planned, rule: str) -> dict:
    """`rules`: the mean over tasks, by each rule of scoring choices; `tasks`: of each task with choices, by `rule`;
    `balanced`: of each whose labels are fixed, see zeroshot.py."""
    summary, scores = read_json(run.folder / "summary.json"), read_json(run.folder / "zeroshot.json")
    by_rule = {name: of["normalised"] for name, of in scores["all"].items() if "normalised" in of}
    rule = rule if rule in by_rule else next(iter(by_rule))  # a bi-encoder has but one
    return {
        "seed": run.seed,
        "trained_tasks": summary["data"]["tasks"],
        "examples": summary["data"]["train_examples"],
        "parameters": summary["model"]["parameters_without_embeddings"],
        "flops": summary["cost"]["flops"],
        "tokens": summary["cost"]["tokens"],
        "seconds": sum(summary["cost"]["seconds"].values()),
        "dev": summary["dev"],
        "scoring_seconds": scores["seconds"],
        "rules": by_rule,
        "tasks": by_task(scores, rule),
        "balanced": by_task(scores, BALANCED),
    }


def by_task(scores: dict, name: str) -> dict[str, float]:
    return {task: round(of[name]["normalised"], 5) for task, of in scores["by_task"].items() if name in of}


def figures(runs: Sequence[dict], first: Sequence[dict], category_of: dict[str, str]) -> dict:
    """Mean over tasks and seeds, with intervals; by category; and beside the first arm, on the tasks of both."""
    mine, theirs = ({task: [run["tasks"][task] for run in of] for task in of[0]["tasks"]} for of in (runs, first))
    found = {
        "trained_tasks": fmean(run["trained_tasks"] for run in runs),
        "examples": fmean(run["examples"] for run in runs),
        "parameters": runs[0]["parameters"],
        "all": interval(np.array(list(mine.values()))),
        "by_category": {},
    }
    if all(run.get("balanced") for run in runs):
        found["balanced"] = interval(
            np.array([[run["balanced"][task] for run in runs] for task in runs[0]["balanced"]])
        )
    both = [task for task in mine if task in theirs]
    if runs is not first and both:
        found["beside_first"] = interval(np.array([mine[t] for t in both]) - np.array([theirs[t] for t in both]))
    for category in sorted({category_of[task] for task in mine}):
        of_category = [row for task, row in mine.items() if category_of[task] == category]
        found["by_category"][category] = interval(np.array(of_category))
    return found


def task_set(folders: Sequence[Path]) -> tuple:
    """What makes losses on dev comparable: by seed the tasks that train and the tokens that they are told in."""
    tasks = [tuple(read_json(folder / "model" / "pool.json")["tasks"]) for folder in folders]
    return tuple(tasks), tuple(read_json(folder / "summary.json").get("tokenizer_sha256") for folder in folders)


def loss_curve(seeds: Iterable[Sequence[dict]]) -> list[Point]:
    """Of the records of some seeds' metrics.jsonl: minus the least loss on dev so far, over FLOPs."""
    dev = [[r | {"less": -r["loss"]} if r["kind"] == "dev" else r for r in records] for records in seeds]
    return training_curve(dev, "less")


def side_by_side(curves: dict[str, list[Point]], sets: dict[str, tuple]) -> dict[str, dict]:
    """Of arms of the same set: the least loss of each, the least that all of them reach, the FLOPs until then
    (`at_most` so many, where the first score is that good already), and how many times as many the slowest takes."""
    found = {}
    for same in dict.fromkeys(sets.values()):
        of = {name: curve for name, curve in curves.items() if sets[name] == same and len(curve) > 1}
        if len(of) < 2:
            continue
        goal = min(curve[-1].score for curve in of.values())
        flops = {name: flops_to(curve, goal) for name, curve in of.items()}
        for name, curve in of.items():
            found[name] = {
                "loss": -curve[-1].score, "goal": -goal, "flops": flops[name],
                "at_most": flops[name] == curve[0].flops, "times": max(flops.values()) / flops[name],
            }  # fmt: skip
    return found


def interval(scores_TS: np.ndarray) -> dict:
    """Mean of float64[tasks, seeds], and its 95% interval over both drawn again."""
    rng = np.random.default_rng(0)
    tasks, seeds = scores_TS.shape
    rows = rng.integers(tasks, size=(RESAMPLES, tasks)) if tasks > 1 else np.zeros((RESAMPLES, 1), int)
    columns = rng.integers(seeds, size=(RESAMPLES, seeds))
    means = np.array([scores_TS[np.ix_(r, c)].mean() for r, c in zip(rows, columns, strict=True)])
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(scores_TS.mean()), "interval": [float(low), float(high)], "tasks": tasks}


def picture(config: ZeropromptConfig, found: dict[str, dict]) -> bytes:
    """Scores with their intervals, arm by arm, and a table in colours: arms by categories."""
    names = list(found)
    categories = sorted({category for of in found.values() for category in of["by_category"]})

    def scores(axes, ink: Ink) -> None:
        means = np.array([100 * found[name]["all"]["mean"] for name in names])
        spread = np.array([[100 * x for x in found[name]["all"]["interval"]] for name in names]).T
        axes.errorbar(range(len(names)), means, np.abs(spread - means), fmt="o", color=ink.others[0], capsize=3)
        axes.axhline(0, color=ink.line, linewidth=1)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        dress(axes, ink, f"{config.name}: points over chance", legend_size=9)

    def by_category(axes, ink: Ink) -> None:
        table = np.full((len(names), len(categories)), np.nan)
        for i, name in enumerate(names):
            for j, category in enumerate(categories):
                if category in found[name]["by_category"]:
                    table[i, j] = 100 * found[name]["by_category"][category]["mean"]
        most = max(1.0, float(np.nanmax(np.abs(table))))
        axes.imshow(table, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
        for (i, j), value in np.ndenumerate(table):
            if not np.isnan(value):
                dark = abs(value) > 0.6 * most
                axes.text(
                    j, i, f"{value:.0f}", ha="center", va="center", fontsize=7, color="white" if dark else "black"
                )
        axes.set_xticks(range(len(categories)), categories, rotation=45, ha="right", fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        dress(axes, ink, "by category", legend_size=9)

    drawings = [scores, by_category] if len(names) <= MOST_BARS else [by_category]
    return render(drawings, LIGHT, width=5.5, height=max(4.0, 1.5 + 0.22 * len(names)))


def show(config: ZeropromptConfig, found: dict[str, dict], learning: dict[str, dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{config.name}: {config.budget:g} FLOPs, {config.seeds} seeds", title_justify="left", box=None)
    beside = ["beside the first"] if any("beside_first" in of for of in found.values()) else []
    for head in ("arm", "tasks", "examples", "over chance", "balanced", *beside):
        add_column(table, head)
    for name, of in found.items():
        row = [name, f"{of['trained_tasks']:.0f}", short(of["examples"]), points(of["all"])]
        row.append(points(of["balanced"]) if "balanced" in of else "-")
        table.add_row(*row, points(of["beside_first"], "+") if "beside_first" in of else "-" if beside else None)
    table.caption = (
        "points of (accuracy - chance) / (1 - chance), with 95% intervals over tasks and seeds; balanced: of tasks "
        "with fixed labels, each of which counts alike, so that always saying the same has 0"
    )
    Console().print(table)
    if learning:
        table = Table(title="Loss on dev, of tasks that train", title_justify="left", box=None)
        for head in ("arm", "at the end", "all reach", "in FLOPs", "times fewer"):
            add_column(table, head)
        for name, of in learning.items():
            most, least = ("≤ ", "≥ ") if of["at_most"] else ("", "")
            figures = (
                f"{of['loss']:.3f}",
                f"{of['goal']:.3f}",
                f"{most}{of['flops']:.2e}",
                f"{least}{of['times']:.2f}",
            )
            table.add_row(name, *figures)
        table.caption = "times fewer: than the slowest arm of the same tasks"
        Console().print(table)


def add_column(table, head: str) -> None:
    """In a narrow terminal names are folded and intervals stand below their means, so that no figure is cut."""
    if head == "arm":
        table.add_column(head, overflow="fold", min_width=12)
    else:
        table.add_column(head, justify="right", no_wrap=head in ("tasks", "examples"))


def points(of: dict, sign: str = "") -> str:
    low, high = (100 * x for x in of["interval"])
    return f"{100 * of['mean']:{sign}.1f} ({low:.1f} to {high:.1f})"
