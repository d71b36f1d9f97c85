"""`tlm bench lowbit`: training by each recipe of few bits beside fp32, over tasks and seeds.

All runs are `tlm train` with the same settings but `precision=` and the seed, so that a seed sees the same text in the
same order. Its gap to fp32 is that of the loss on passages of the selection that no run trains on, and of the dev
score; the seeds' own spread stands beside it. With a pool its prompted tasks are one task more, by `tlm pretrain`: loss
is that of the tokens of answers that no run trains on, dev the share of these tokens that are guessed.

Runs are ordinary run folders, queued over processes of one thread: what has finished is never done again, and the same
command goes on where it was stopped. Test is not read.
"""

from pathlib import Path
from statistics import fmean, stdev

from tasks.errors import InputError
from tlm.benches.recipe import HELD_OUT_PASSAGES
from tlm.config import RECIPES, LowbitConfig
from tlm.curves import read_metrics
from tlm.jobs import Planned, check_settings, planned, queue, settings_of, task_name, tasks_by_name
from tlm.progress import Progress
from tlm.run import environment, read_json, write_json

FP32 = "fp32"
FIXED = ("task", "corpus", "run", "out", "cache", "seed", "threads", "test", "precision", "budget")


def bench(config: LowbitConfig) -> int:
    check(config)
    progress, runs = Progress(), runs_of(config)
    queue(list(runs.values()), config.jobs, progress)
    results = {name: result(run) for name, run in runs.items()}
    found = {(t, r): figures(results, t, r) for t in tasks_of(config).values() for r in (FP32, *config.recipes)}
    code = sorted({str(read_json(run.folder / "env.json")["git_commit"]) for run in runs.values()})
    listed = [{"task": t, "recipe": r, "seed": s} | of_run for (t, r, s), of_run in results.items()]
    beside = [{"task": task, "recipe": recipe} | values for (task, recipe), values in found.items()]
    out = {"machine": environment(), "code": code, "settings": config.settings, "runs": listed, "by_seed": beside}
    write_json(Path(config.out) / "lowbit.json", out)
    show(found)
    return 0


def check(config: LowbitConfig) -> None:
    """Raises InputError, before anything is run."""
    if unknown := next((recipe for recipe in config.recipes if recipe not in (*RECIPES, "bf16")), None):
        raise InputError(f"recipes=[{unknown}]: no recipe to train by; use some of {', '.join((*RECIPES, 'bf16'))}")
    check_settings("settings", config.settings, FIXED, list(tasks_of(config)))


def tasks_of(config: LowbitConfig) -> dict[str, str]:
    """By name; the pool is the last."""
    return tasks_by_name(config.task, *filter(None, [config.pool]))


def runs_of(config: LowbitConfig) -> dict[tuple[str, str, int], Planned]:
    """By task, recipe and seed; those of a seed together, so that gaps are known early."""
    both = ["boards=[]", "keep_checkpoints=1", f"budget={config.budget}", f"cache={config.cache}", "threads=1"]
    labelled = [f"corpus={config.corpus}", f"joint.held_out={HELD_OUT_PASSAGES}", "test=false"]
    runs = {}
    for seed in range(config.seeds):
        for called, task in tasks_of(config).items():
            verb, data = "train", [f"task={task}", *labelled]
            if task == config.pool:
                verb, data = "pretrain", [f"pool.path={task}"]
            given = settings_of(config.settings, called)
            for recipe in (FP32, *config.recipes):
                name, out = f"{recipe}-{seed}", Path(config.out) / called
                own = [*given, f"out={out}", f"run={name}", f"seed={seed}", f"precision={recipe}"]
                runs[task, recipe, seed] = planned(task, seed, out / name, [*data, *both, *own], config.budget, verb)
    return runs


def result(run: Planned) -> dict:
    """`loss`: of held-out passages or answers, at the joint stage's end; `spikes`: steps whose loss jumped."""
    summary, records = read_json(run.folder / "summary.json"), read_metrics(run.folder)
    kind, loss = ("dev", "loss") if run.verb == "pretrain" else ("held_out", "mlm_loss")
    return {
        "loss": [record[loss] for record in records if record["kind"] == kind][-1],
        "dev": summary["dev"][summary["metric"]],
        "spikes": sum(r["kind"] == "spike" for r in records),
        "seconds": sum(
            seconds for stage, seconds in summary["cost"]["seconds"].items() if stage in ("joint", "finetune")
        ),
    }


def figures(results: dict, task: str, recipe: str) -> dict[str, list[float]]:
    """By what is measured: a value for each seed."""
    seeds = [seed for of, name, seed in results if (of, name) == (task, recipe)]
    pairs = [(results[task, recipe, seed], results[task, FP32, seed]) for seed in seeds]
    return {
        "loss": [mine["loss"] for mine, _ in pairs],
        "loss gap": [mine["loss"] / plain["loss"] - 1 for mine, plain in pairs],
        "dev": [mine["dev"] for mine, _ in pairs],
        "dev gap": [mine["dev"] - plain["dev"] for mine, plain in pairs],
        "time": [mine["seconds"] / plain["seconds"] for mine, plain in pairs],
        "spikes": [mine["spikes"] for mine, _ in pairs],
    }


FORMS = {"loss": "{:.4f}", "loss gap": "{:+.2%}", "dev": "{:.1%}", "dev gap": "{:+.1%}", "time": "{:.2f} x"}


def show(found: dict[tuple[str, str], dict[str, list[float]]]) -> None:
    """A table a task: means over the seeds, and their standard deviations."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.width = max(console.width, 110)
    for task in dict.fromkeys(task for task, _ in found):
        seeds = len(found[task, FP32]["loss"])
        table = Table(title=f"{task_name(task)}, {seeds} seeds, beside fp32", title_justify="left", box=None)
        table.add_column("precision", no_wrap=True)
        for name in (*FORMS, "spikes"):
            table.add_column(name, justify="right", no_wrap=True)
        for recipe in [recipe for of, recipe in found if of == task]:
            values = found[task, recipe]
            cells = [shown(form, values[name]) for name, form in FORMS.items()]
            table.add_row(recipe, *cells, str(sum(values["spikes"])))
        console.print(table)


def shown(form: str, values: list[float]) -> str:
    mean = form.format(fmean(values))
    return f"{mean} ±{form.format(stdev(values)).lstrip('+')}" if len(values) > 1 else mean
