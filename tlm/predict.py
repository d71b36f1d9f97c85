"""Using finished runs: scores on a split, labels and probabilities for new texts."""

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tasks.columns import text_columns
from tasks.errors import InputError
from tasks.files import read_records
from tlm.config import EvalConfig, PredictConfig, TrainConfig
from tlm.run import read_json

TEXTS_AT_A_TIME = 512


@dataclass(frozen=True)
class Predictor:
    """What a finished run can do: texts -> probabilities float64[n, labels]."""

    folder: Path
    labels: tuple[str, ...]
    probabilities: "callable"


def open_run(folder: str | Path, threads: int = 0, device: str = "auto", precision: str | None = None) -> Predictor:
    """A finished run's model, or a packed one; `device` as `device=` names it. Raises InputError where it is missing
    or damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run; name the folder of a finished run, such as runs/NAME")
    if not (folder / "summary.json").exists():
        raise InputError(f"{folder}: holds no finished run (no summary.json); finish it by the command that began it")
    summary = read_json(folder / "summary.json")
    if "arms" in summary:
        raise InputError(f"{folder}: holds several runs; name one of {', '.join(sorted(summary['arms']))} inside it")
    labels = tuple(summary["labels"])
    if summary["arm"] == "tfidf":
        raise InputError(f"{folder}: the classical rival keeps no model; name the run of another arm")
    if summary["arm"] == "bi-encoder":
        raise InputError(f"{folder}: chooses answers to prompts, without labels of its own; give `tlm eval` a pool=")
    if "attention" in summary["model"]:
        raise InputError(f"{folder}: is a generative run, without labels of its own; give `tlm eval` a pool=")
    if summary["arm"] == "pretraining":
        raise InputError(f"{folder}: knows no labels, it was made to start from (init_from={folder}/model)")
    model = neural(folder / "model", summary.get("tokenizer_sha256"), threads, device, precision)
    return Predictor(folder, labels, model)


def neural(folder: Path, tokenizer_sha256: str | None, threads: int, device: str, precision: str | None):
    import torch

    from tlm import lowbit
    from tlm.engine import device_of
    from tlm.evaluate import probabilities
    from tlm.model import load_model
    from tlm.objectives import Source
    from tlm.prepare import encoded
    from tlm.tokenizer import own_tokenizer
    from tlm.tokens import heads

    torch.set_num_threads(threads or torch.get_num_threads())
    if precision or (folder / "packed.safetensors").exists():
        from tlm.lowbit.inference import open_packed

        model, place = open_packed(folder, precision), device_of("cpu")
    else:
        model, place = load_model(folder), device_of(device)
        if model.shape.recipe and place.type != "cpu":
            lowbit.check_gpu(f"precision={model.shape.recipe}", place)
    model.to(place)
    tokenizer = own_tokenizer(folder / "tokenizer.json", model.shape.vocabulary, tokenizer_sha256)

    def of_texts(texts: list[str]) -> np.ndarray:
        passages, _ = heads(encoded(texts, tokenizer), model.shape.max_length)
        return probabilities(model, Source(passages.sequence, passages.lengths))

    return of_texts


def open_runs(names: str, threads: int = 0, device: str = "auto", precision: str | None = None) -> Predictor:
    """One run, or several as `A,B,C`, whose probabilities are averaged: runs that differ in their seed err in different
    places. Raises InputError as `open_run` does, and where their labels are not the same."""
    folders = [names] if Path(names).is_dir() else names.split(",")
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise InputError(f"{names}: {twice or 'an empty name'} stands there twice; name each run once")
    first, *others = runs = [open_run(folder, threads, device, precision) for folder in folders]
    for other in others:
        if other.labels != first.labels:
            raise InputError(
                f"{other.folder}: its labels ({', '.join(other.labels)}) are not those of {first.folder} "
                f"({', '.join(first.labels)}); name runs of one task"
            )

    def mean(texts: list[str]) -> np.ndarray:
        return np.mean([run.probabilities(texts) for run in runs], axis=0)

    return replace(first, probabilities=mean) if others else first


def predict_file(run: str, file: str, config: PredictConfig) -> int:
    """A JSON line for each text of `file` (or a line each of standard input): label and probabilities."""
    predictor = open_runs(run, config.threads, config.device, config.precision)
    texts = standard_input() if file == "-" else texts_of(file, config.text_column)
    while batch := list(itertools.islice(texts, TEXTS_AT_A_TIME)):
        rows = predictor.probabilities([text for _, text in batch])
        for (name, _), row in zip(batch, rows, strict=True):
            shares = {label: round(float(p), 6) for label, p in zip(predictor.labels, row, strict=True)}
            print(json.dumps({"id": name, "label": predictor.labels[int(row.argmax())], "probabilities": shares}))
    sys.stdout.flush()
    return 0


def standard_input() -> Iterator[tuple[str, str]]:
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(f"-: line {number} is not UTF-8 (byte {error.start}); convert the text first") from None
        if text:
            yield str(number), text


def texts_of(path: str, given: str | None) -> Iterator[tuple[str, str]]:
    for number, record in read_records(path):
        columns = text_columns(list(record), given, f"{path}:{number}")
        yield str(record.get("id", number)), " ".join(str(record[column]) for column in columns)


def evaluate_runs(names: list[str], config: EvalConfig) -> int:
    """Prints a JSON line of scores for each run, on its own task or on another with the same labels."""
    from tlm import config as configs
    from tlm.evaluate import scores
    from tlm.prepare import open_task

    for name in names:
        predictor = open_runs(name, config.threads, config.device, config.precision)
        trained = configs.load(TrainConfig, [str(predictor.folder / "config.yaml")])
        task = open_task(config.task, config.data) if config.task else open_task(trained.task, trained.data)
        if task.labels != predictor.labels:
            raise InputError(
                f"{task.source}: its labels ({', '.join(task.labels)}) are not those of {name} "
                f"({', '.join(predictor.labels)})"
            )
        result = scores(predictor.probabilities(task.texts(config.split)), np.array(task.targets(config.split)))
        print(json.dumps({"run": name, "task": task.name, "split": config.split, **result}))
    return 0
