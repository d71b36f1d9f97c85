"""The command line: `tlm VERB [config.yaml ...] [key=value ...]`. Each verb is a few lines; nothing heavy is imported
before it is needed, so that `--help` answers at once."""

import operator
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tasks.errors import InputError
from tlm import __version__
from tlm import config as configs
from tlm.benches import BENCHES
from tlm.signals import Stopped


@dataclass(frozen=True)
class Verb:
    does: str
    takes: str  # what stands between the verb and its keys
    config: type
    run: Callable


def demo(config: configs.DemoConfig, names: list[str]) -> int:
    from tlm.demo import demo

    return demo(config)


def retrieve(config: configs.RetrieveConfig, names: list[str]) -> int:
    from tlm.retrieve import retrieve

    return retrieve(config)


def corpus_add(config: configs.CorpusConfig, names: list[str]) -> int:
    from pathlib import Path

    from tlm.corpus import add

    return add(Path(names[0]).expanduser(), names[1:], config)


def train(config: configs.TrainConfig, names: list[str]) -> int:
    from rich.console import Console

    from tlm.arms import run
    from tlm.tables import table

    summary = run(config)
    if os.environ.get("RANK", "0") == "0":
        Console().print(table({summary["arm"]: summary}))
        print(os.path.join(config.out, config.run))
    return 0


def pretrain(config: configs.PretrainConfig, names: list[str]) -> int:
    from tlm.multitask import pretrain

    summary = pretrain(config)
    if os.environ.get("RANK", "0") == "0":
        scores = ", ".join(f"{name} {value:.4f}" for name, value in (summary["dev"] or {}).items() if name != "step")
        print(f"test split of the {summary['data']['tasks']:,} tasks that trained: {scores or 'not scored'}")
        print(os.path.join(config.out, config.run))
    return 0


def evaluate(config: configs.EvalConfig, names: list[str]) -> int:
    if config.pool:
        from tlm.zeroshot import evaluate_pool

        return evaluate_pool(names, config)
    from tlm.predict import evaluate_runs

    return evaluate_runs(names, config)


def search(config: configs.SearchConfig, names: list[str]) -> int:
    from tlm.search import search_runs

    return search_runs(names, config)


def predict(config: configs.PredictConfig, names: list[str]) -> int:
    from tlm.predict import predict_file

    return predict_file(names[0], names[1] if len(names) > 1 else "-", config)


def export(config: configs.ExportConfig, names: list[str]) -> int:
    from tlm.export import export_run

    return export_run(names[0], config.out, config.quant)


def report(config: configs.ReportConfig, names: list[str]) -> int:
    from tlm.report import report

    return report(names, config)


def bench(name: str, config: Any, names: list[str]) -> int:
    from importlib import import_module

    return import_module(f"tlm.benches.{name.replace('-', '_')}").bench(config)


def compare(config: configs.CompareConfig, names: list[str]) -> int:
    from tlm.compare import compare

    return compare(config)


def pool_show(config: configs.PoolConfig, names: list[str]) -> int:
    from tlm.pool import show

    return show(names[0], config)


def pool_build(config: configs.PoolBuildConfig, names: list[str]) -> int:
    from tlm.pool_build import build

    return build(config)


def doctor(config: configs.DoctorConfig, names: list[str]) -> int:
    from tlm.doctor import doctor

    return doctor(as_json=config.json)


VERBS = {
    "demo": Verb("the main job on embedded data: four arms, a table and a report", "", configs.DemoConfig, demo),
    "retrieve": Verb("select the general text that helps a task", "", configs.RetrieveConfig, retrieve),
    "corpus add": Verb(
        "add documents to a corpus store, or begin one", "STORE FILE ...", configs.CorpusConfig, corpus_add
    ),
    "train": Verb("one run: retrieve, joint stage, finetune stage, test once", "", configs.TrainConfig, train),
    "pretrain": Verb(
        "one generative model on many prompted tasks, and on the language of a corpus",
        "",
        configs.PretrainConfig,
        pretrain,
    ),
    "compare": Verb(
        "arms over seeds at equal FLOPs, pretrain-then-finetune among them", "", configs.CompareConfig, compare
    ),
    "eval": Verb(
        "score finished runs: on dev or test, or on categories of a pool that they never saw",
        "RUN[,RUN...] ...",
        configs.EvalConfig,
        evaluate,
    ),
    "search": Verb("better prompts for tasks of a pool, by genetic search", "RUN ...", configs.SearchConfig, search),
    "predict": Verb(
        "labels and probabilities as JSON lines", "RUN[,RUN...] [FILE or -]", configs.PredictConfig, predict
    ),
    "export": Verb("write a folder that `transformers` opens", "RUN", configs.ExportConfig, export),
    "report": Verb(
        "one HTML page and PNGs from run folders, finished or not, and selections",
        "RUN ...",
        configs.ReportConfig,
        report,
    ),
    **{
        f"bench {name}": Verb(does, "", getattr(configs, kind), partial(bench, name))
        for name, (does, kind) in BENCHES.items()
    },
    "pool build": Verb(
        "a pool of published tasks out of the packages bigbench and evals", "", configs.PoolBuildConfig, pool_build
    ),
    "pool show": Verb("what a pool of prompted tasks holds", "POOL", configs.PoolConfig, pool_show),
    "doctor": Verb(
        "what is installed, what works here, and how to get what is missing", "", configs.DoctorConfig, doctor
    ),
}
REQUIRED = {
    "train": ("task",),
    "pretrain": ("pool.path",),
    "retrieve": ("task", "corpus"),
    "search": ("pool",),
    "export": ("out",),
    "pool build": ("out",),
    "compare": ("task", "corpus"),
    "bench retrieval": ("task",),
    "bench resume": ("task",),
    "bench quant": ("runs",),
    "bench lowbit": ("task", "corpus"),
    "bench zeroprompt": ("name", "pool"),
    "bench zeroshot": ("run", "pool"),
    "bench recipe": ("name", "data", "corpus"),
}
SAID = {
    "pool show": ("pool", "FOLDER"),
    "corpus add": ("store and which files", "STORE more.jsonl"),
}
POSITIONAL = {
    "corpus add": (2, 99),
    "eval": (1, 99),
    "search": (1, 99),
    "predict": (1, 2),
    "export": (1, 1),
    "report": (1, 99),
    "pool show": (1, 1),
}


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return dispatch([a for a in arguments if not a.startswith("--local_rank")])
    except InputError as error:
        print(f"tlm: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            command = shlex.join(["tlm", *arguments])
            print(f"tlm: stopped by {stopped}; `{command}` goes on from where it is", file=sys.stderr)
        return 128 + stopped.number
    except KeyboardInterrupt:
        print("tlm: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `tlm predict ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"tlm {__version__}")
        return 0
    name, *rest = arguments
    if " ".join(arguments[:2]) in VERBS:  # a verb of two words
        name, rest = " ".join(arguments[:2]), rest[1:]
    if name not in VERBS:
        import difflib

        among = [verb for verb in VERBS if verb.startswith(f"{name} ")]
        name = " ".join(arguments[: 2 if among else 1])
        near = difflib.get_close_matches(name, among or VERBS, 1, 0.8 if among else 0.6)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(among or VERBS)}"
        raise InputError(f"{name}: no such verb; {hint}")
    verb = VERBS[name]
    if "-h" in rest or "--help" in rest:
        print(help_of(name, verb))
        return 0
    dry_run = "--dry-run" in rest
    rest = [a for a in rest if a != "--dry-run"]
    if unknown := next((a for a in rest if a.startswith("--")), None):
        raise InputError(f"{unknown}: no such option; keys are given as key=value, and `tlm {name} --help` lists them")
    names, settings = split_arguments(name, rest)
    config = configs.validate(configs.load(verb.config, settings))
    for key in REQUIRED.get(name, ()):
        if not operator.attrgetter(key)(config):
            said = key.removesuffix(".path")
            raise InputError(f"{said}=: missing; `tlm {name} {said}=...` needs it (see `tlm {name} --help`)")
    if dry_run:
        if name != "train":
            raise InputError(f"--dry-run: `tlm {name}` has no dry run; `tlm train` has")
        from tlm.plan import show

        show(config)
        return 0
    return verb.run(config, names)


def split_arguments(verb: str, arguments: list[str]) -> tuple[list[str], list[str]]:
    """(names of runs and files, YAML files and key=value settings)."""
    is_setting = [("=" in a and not os.path.exists(a)) or a.endswith((".yaml", ".yml")) for a in arguments]
    names = [a for a, setting in zip(arguments, is_setting, strict=True) if not setting]
    least, most = POSITIONAL.get(verb, (0, 0))
    if not least <= len(names) <= most:
        extra = names[most] if len(names) > most else None
        what, example = SAID.get(verb, ("run", "runs/NAME"))
        raise InputError(
            f"{extra}: not key=value and not a .yaml file"
            if extra
            else f"tlm {verb}: say which {what}, as in `tlm {verb} {example}`"
        )
    return names, [a for a, setting in zip(arguments, is_setting, strict=True) if setting]


def overview() -> str:
    width = max(len(f"{name} {verb.takes}") for name, verb in VERBS.items())
    rows = [f"  {f'{name} {verb.takes}':<{width}}  {verb.does}" for name, verb in VERBS.items()]
    return "\n".join([
        "tlm: strong task models from scratch, without large-scale pretraining",
        "",
        "usage: tlm VERB [config.yaml ...] [key=value ...]",
        "",
        *rows,
        "",
        "`tlm VERB --help` lists a verb's keys; `tlm train --dry-run ...` shows what would run; `tlm --version`.",
    ])  # fmt: skip


def help_of(name: str, verb: Verb) -> str:
    rows = [
        (key, kind, "" if default in (None, "") else str(default), text)
        for key, kind, default, text in configs.rows_of(verb.config())
    ]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    lines = [
        f"  {key:<{widths[0]}}  {kind:<{widths[1]}}  {default:<{widths[2]}}  {text}"
        for key, kind, default, text in rows
    ]
    usage = " ".join(["usage: tlm", name, *([verb.takes] if verb.takes else []), "[config.yaml ...] [key=value ...]"])
    return "\n".join([f"tlm {name}: {verb.does}", "", usage, "", "keys (type, default):", *lines])


if __name__ == "__main__":
    sys.exit(main())
