"""`tlm bench recipe`: a recipe over the yardstick's tasks at equal FLOPs, beside the last record. Its rules:

- Runs are scored on dev. The test splits stay closed until `final=true`, which alone scores them and admits the
  held-out tasks, so that these show whether a recipe was fitted to its yardstick. (As everywhere, texts of test are
  read to keep their like out of training and selection.)
- A run's steps follow from its budget (`tlm train budget=`), the start of the embeddings included. Selection and
  tokenizing count in seconds, cached or not.
- The score of a run is (metric - majority) / (1 - majority), where majority always says train's commonest label; that
  of a recipe is the mean over tasks and seeds.
- A record is better than the last one of its budget on the whole yardstick with at least three seeds, p < 0.05.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

from tasks.errors import InputError
from tasks.metrics import METRICS
from tasks.types import Task
from tlm import plan
from tlm.config import RecipeConfig, TrainConfig, load, validate
from tlm.curves import read_metrics
from tlm.evaluate import test_scores
from tlm.jobs import Planned, check_settings, planned, queue, settings_of
from tlm.predict import open_run
from tlm.prepare import open_task
from tlm.progress import Progress
from tlm.run import read_json, write_json, write_text
from tlm.tables import percent, scientific, short, whole

YARDSTICK = ("sciie", "chemprot", "imdb", "ag_news", "rct_pmc", "hyperpartisan", "trec")
HELD_OUT = ("citation_intent", "scicite", "sst2", "helpfulness", "tweet_emotion", "banking77")
FINAL = (*YARDSTICK, *HELD_OUT, "bbc_news")
TRAIN_TEXTS = {"imdb": 1000, "ag_news": 500, "rct_pmc": 2000}  # of the others all
FIXED = ("task", "data.", "run", "out", "cache", "seed", "threads", "test", "budget", "joint.steps", "finetune.steps")
TFIDF = "tfidf"  # the rival's runs lie in a folder of this name
HELD_OUT_PASSAGES = 200
LEAST_SEEDS, LARGEST_P = 3, 0.05  # of a record
RESAMPLES = 99_999


def bench(config: RecipeConfig) -> int:
    """Makes the runs that are missing and shows the table; exit status 1 if a record was asked for and it is none."""
    names = check(config)
    progress, folder = Progress(), Path(config.out) / config.name / budget_name(config.budget)
    opponent = find_opponent(config)  # first, so that a wrong name is told at once
    tasks, rivals, runs = {}, {}, []
    for name in names:
        rivals[name] = tfidf_run(config, name)
        tasks[name], of_task = recipe_runs(config, name, folder)
        runs += of_task
    runs.sort(key=lambda run: run.seed)  # a task's selection is made once, so that its seeds should not begin together
    queue([*rivals.values(), *runs], config.jobs, progress)

    split = "test" if config.final else "dev"
    results = [result(run, tasks[run.task], rivals[run.task], split) for run in runs]
    summary = {
        "name": config.name,
        "split": split,
        "budget": config.budget,
        "recipe": config.recipe,
        "score": fmean(r["score"] for r in results),
        "compared": compare(results, opponent),
        "code": sorted({str(read_json(run.folder / "env.json")["git_commit"]) for run in runs}),
        "runs": results,
    }
    write_json(folder / summary_name(config), summary)
    show(summary)
    return keep_record(config, summary, progress) if config.record else 0


def check(config: RecipeConfig) -> list[str]:
    """The names of the tasks. Raises InputError for what breaks the rules, before anything is run."""
    if config.record and config.against:
        raise InputError(f"record={config.record}: is held against the last record; leave against= out")
    names = config.tasks or list(FINAL if config.final else YARDSTICK)
    if closed := next((name for name in names if name in HELD_OUT and not config.final), None):
        raise InputError(f"tasks=[{closed}]: held out, not to be tuned on; leave it until the end (final=true)")
    if config.name in (TFIDF, f"{TFIDF}-final"):
        raise InputError(f"name={config.name}: is the rival's; choose another")
    if path := next((name for name in (config.name, *names) if Path(name).name != name), None):
        raise InputError(f"{path}: must be a plain name, as folders are called by it")
    open_tasks = [name for name in dict.fromkeys((*FINAL, *names)) if name not in HELD_OUT]
    check_settings("recipe", config.recipe, FIXED, open_tasks)
    if config.record and (config.final or config.seeds < LEAST_SEEDS or set(names) != set(YARDSTICK)):
        raise InputError(
            f"record={config.record}: a record is made on dev of the whole yardstick with {LEAST_SEEDS} seeds or more; "
            "leave tasks= and final= out"
        )
    return names


# --- the runs -------------------------------------------------------------------------------------------------------


def recipe_runs(config: RecipeConfig, name: str, folder: Path) -> tuple[Task, list[Planned]]:
    """The task, and its run for each seed. Raises InputError where a run folder holds something else."""
    given = [f"corpus={config.corpus}", f"joint.held_out={HELD_OUT_PASSAGES}", "boards=[]", "keep_checkpoints=1"]
    given += [*settings_of(config.recipe, name), *same_for_all(config, name), f"out={folder}", "test=false"]
    given.append(f"budget={config.budget}")
    train = validate(load(TrainConfig, given))
    task, runs = open_task(train.task, train.data), []
    plan.fitted(train, task)  # raises where it is too small
    for seed in range(config.seeds):
        settings = [*given, f"seed={seed}", f"run={name}-{seed}"]
        runs.append(planned(name, seed, folder / f"{name}-{seed}", settings, config.budget))
    return task, runs


def tfidf_run(config: RecipeConfig, name: str) -> Planned:
    folder = Path(config.out) / (f"{TFIDF}-final" if config.final else TFIDF)
    test = str(config.final).lower()
    settings = ["model=tfidf", *same_for_all(config, name), f"out={folder}", f"test={test}", f"run={name}"]
    return planned(name, 0, folder / name, settings)


def same_for_all(config: RecipeConfig, name: str) -> list[str]:
    limit = [f"data.train_limit={TRAIN_TEXTS[name]}"] if name in TRAIN_TEXTS else []
    return [f"task={Path(config.data) / name}", *limit, f"cache={config.cache}", "threads=1"]


# --- what came of them ----------------------------------------------------------------------------------------------


def result(run: Planned, task: Task, rival: Planned, split: str) -> dict:
    """Scores as fractions. `to_tfidf`: tokens, FLOPs and seconds when dev first reached TF-IDF's dev score, or None."""
    summary, classical = read_json(run.folder / "summary.json"), read_json(rival.folder / "summary.json")
    metric, cost, majority = task.metric, summary["cost"], majority_score(task, split)
    records = read_metrics(run.folder)
    mine = read_test(run, task)[metric] if split == "test" else summary["dev"][metric]
    return {
        "task": run.task,
        "seed": run.seed,
        "metric": metric,
        split: mine,
        "score": (mine - majority) / (1 - majority),
        "majority": majority,
        "tfidf": classical[split][metric],
        "tokens": cost["tokens"],
        "flops": cost["flops"],
        "seconds": sum(cost["seconds"].values()),
        "to_tfidf": reached(records, metric, classical["dev"][metric]),
        "mlm_loss": next((r["mlm_loss"] for r in records if r["kind"] == "held_out"), None),
    }


def majority_score(task: Task, split: str) -> float:
    gold, train = np.array(task.targets(split)), np.array(task.targets("train"))
    return METRICS[task.metric](gold, np.full_like(gold, np.bincount(train).argmax()), len(task.labels))


def reached(records: Sequence[dict], metric: str, target: float) -> dict | None:
    """The cost in the first log line after the first dev score of `target` or more."""
    there = False
    for record in records:
        there = there or (record["kind"] == "dev" and record[metric] >= target)
        if there and record["kind"] == "train":
            return {name: record[name] for name in ("tokens", "flops", "seconds")}
    return None


def read_test(run: Planned, task: Task) -> dict:
    """Scores on test, read once and kept in the run folder."""
    path = run.folder / "test.json"
    if not path.exists():
        write_json(path, test_scores(task, open_run(run.folder, threads=1).probabilities(task.texts("test"))))
    return read_json(path)


def find_opponent(config: RecipeConfig) -> dict | None:
    """The summary of what the recipe is compared with: `against`, or the last record of the same budget."""
    if config.against:
        return read_json(Path(config.out) / config.against / budget_name(config.budget) / summary_name(config))
    of_budget = [record for record in read_records(config) if record["budget"] == config.budget]
    return of_budget[-1] if of_budget and not config.final else None


def read_records(config: RecipeConfig) -> list[dict]:
    return [read_json(path) for path in sorted(Path(config.records).glob("[0-9][0-9]-*/summary.json"))]


def compare(results: Sequence[dict], opponent: dict | None) -> dict | None:
    """The mean difference of scores over the (task, seed) that both have, and its p by flipping signs (two-sided)."""
    from scipy.stats import permutation_test

    if opponent is None:
        return None
    theirs = {(r["task"], r["seed"]): r["score"] for r in opponent["runs"]}
    mine = {(r["task"], r["seed"]): r["score"] for r in results}
    gains = {pair: score - theirs[pair] for pair, score in mine.items() if pair in theirs}
    if not gains:
        raise InputError(f"{opponent['name']}: has no run of a task and seed of these; choose another against=NAME")
    test = permutation_test(
        (list(gains.values()),), np.mean, permutation_type="samples", n_resamples=RESAMPLES, random_state=0
    )
    return {
        "with": opponent["name"],
        "pairs": len(gains),
        "difference": float(test.statistic),
        "p": float(test.pvalue),
        "by_task": {task: fmean(gain for (of, _), gain in gains.items() if of == task) for task, _ in gains},
    }


def keep_record(config: RecipeConfig, summary: dict, progress: Progress) -> int:
    """Writes configuration and summary into a new folder of the records, if it is one; 1 if it is none."""
    compared, same = summary["compared"], len(summary["runs"])
    if compared and (compared["difference"] <= 0 or compared["p"] >= LARGEST_P or compared["pairs"] < same):
        progress.say(
            f"no record: one is better than {compared['with']} with p < {LARGEST_P} over all {same} tasks and seeds"
        )
        return 1
    folder = Path(config.records) / f"{len(read_records(config)) + 1:02d}-{config.record}"
    lines = [f"{name}: {json.dumps(getattr(config, name))}" for name in ("name", "recipe", "budget", "seeds")]
    write_text(folder / "config.yaml", "\n".join(["# tlm bench recipe config.yaml data=... corpus=...", *lines, ""]))
    write_json(folder / "summary.json", summary | {"name": folder.name})
    progress.say(f"a record: {folder}")
    return 0


def show(summary: dict) -> None:
    """A line for each task; scores in percent, costs as means over the seeds."""
    from rich.console import Console
    from rich.table import Table

    results, compared, split = summary["runs"], summary["compared"], summary["split"]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("task", no_wrap=True, vertical="bottom")
    of_rival = [f"{what}\nto TF-IDF" for what in ("tokens", "FLOPs", "seconds", "seeds")]
    for title in ("TF-IDF", split, "score", "change", "FLOPs", "seconds", *of_rival, "held-out\nMLM loss"):
        table.add_column(title, justify="right", vertical="bottom", no_wrap=True)
    for task in dict.fromkeys(r["task"] for r in results):
        rows = [r for r in results if r["task"] == task]
        change = compared["by_task"].get(task) if compared else None
        table.add_row(task, percent(rows[0]["tfidf"]), *cells(rows, split, change))
    table.add_row("mean", percent(fmean(r["tfidf"] for r in results)),
                  *cells(results, split, compared and compared["difference"]))  # fmt: skip
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)
    end = "no record of this budget yet"
    if compared:
        end = f"{100 * compared['difference']:+.2f} to {compared['with']}, p = {compared['p']:.4f}"
        end += f" over {compared['pairs']} pairs"
    console.print(f"{summary['name']}, {summary['budget']:g} FLOPs a run: score {percent(summary['score'])}, {end}")


def cells(rows: Sequence[dict], split: str, change: float | None) -> list[str]:
    spread = f" ±{percent(stdev(r[split] for r in rows))}" if len({r["task"] for r in rows}) == 1 < len(rows) else ""
    reached = [r["to_tfidf"] for r in rows if r["to_tfidf"]]
    losses = [r["mlm_loss"] for r in rows if r["mlm_loss"] is not None]
    return [
        percent(fmean(r[split] for r in rows)) + spread,
        percent(fmean(r["score"] for r in rows)),
        f"{100 * change:+.1f}" if change is not None else "-",
        scientific(fmean(r["flops"] for r in rows)),
        whole(fmean(r["seconds"] for r in rows)),
        *(
            form(fmean(r[name] for r in reached)) if reached else "-"
            for name, form in (("tokens", short), ("flops", scientific), ("seconds", whole))
        ),
        f"{len(reached)}/{len(rows)}",
        f"{fmean(losses):.3f}" if losses else "-",
    ]  # fmt: skip


def budget_name(budget: float) -> str:
    """2.4e+13 -> 2.4e13"""
    return f"{budget:g}".replace("e+", "e")


def summary_name(config: RecipeConfig) -> str:
    return "final.json" if config.final else "summary.json"
