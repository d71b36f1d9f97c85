"""`tlm bench quant`: trained runs in fewer bits, beside what they were: scores on dev, bytes on disk, time.

Nothing is trained again. A form is a file, opened in a process of its own: fp32 (the run's model, adapters merged);
int8 (8-bit products by our kernels); nf4 (bitsandbytes' weights, fp32 products); ternary (weights rounded to three
values, our kernels); onnx-int8 (ONNX Runtime). Of a run trained by precision=ternary or binary there are the emulation
that trained it, called fp32, and its packed form. Times are processor time, as in `tlm bench kernels`.
"""

import importlib.util
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

from tasks.errors import InputError
from tlm import config as configs
from tlm.batches import pack
from tlm.benches import rounds
from tlm.benches.kernels import turns
from tlm.config import QuantConfig, TrainConfig
from tlm.evaluate import batches_by_length, scores
from tlm.lowbit import adapt, merge
from tlm.lowbit.inference import FILE, load_packed, own_precision, pack_model, save_packed
from tlm.model import Transformer, load_model, save_model
from tlm.predict import open_run
from tlm.prepare import open_task, task_source
from tlm.progress import Progress
from tlm.run import environment, write_json
from tlm.tokenizer import load_tokenizer

FORMS = ("fp32", "int8", "nf4", "ternary", "onnx-int8")
ONNX = "model.onnx"
AT_ONCE = 256  # texts of the turn that tells texts/s
Answers = Callable[[list[np.ndarray]], np.ndarray]  # tokens of some texts -> logits, float[texts, labels]


def forms_of(model: Transformer, asked: list[str]) -> list[str]:
    """Of those asked for, what there is of this model and can be had here."""
    own = own_precision(model.shape)
    if own != "int8":
        return ["fp32", own]
    packages = {"nf4": ["bitsandbytes"], "onnx-int8": ["onnx", "onnxruntime"]}
    return [form for form in asked if all(map(importlib.util.find_spec, packages.get(form, [])))]


def write(run: Path, form: str, folder: Path) -> Path:
    """The file of a form, in `folder`."""
    model = load_model(run / "model")
    merge(model)
    if form == "onnx-int8":
        from tlm.onnx_graph import to_int8
        from tlm.onnx_graph import write as write_graph

        folder.mkdir()
        write_graph(model, folder / ONNX)
        to_int8(folder / ONNX)
        return folder / ONNX
    if form == "nf4":
        adapt(model, "nf4", rank=0)
    elif form != "fp32":
        if form == "ternary":
            model.shape = replace(model.shape, recipe="ternary")  # as if it had been trained so
        pack_model(model, form)
    save_model(model, folder)
    if form in ("fp32", "nf4"):
        return folder / "model.safetensors"
    (folder / "model.safetensors").unlink()
    save_packed(model, folder)
    return folder / FILE


def opened(path: Path, threads: int) -> Answers:
    if path.name == ONNX:
        return by_onnx(path, threads)
    model = load_packed(path.parent) if path.name == FILE else load_model(path.parent)

    @torch.inference_mode()
    def answers(texts: list[np.ndarray]) -> np.ndarray:
        batch = pack(texts)
        return model.classify(model(batch), batch).numpy()

    return answers


def by_onnx(path: Path, threads: int) -> Answers:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path.read_bytes(), options)

    def answers(texts: list[np.ndarray]) -> np.ndarray:
        tokens = np.zeros((len(texts), max(map(len, texts))), np.int64)
        mask = np.zeros_like(tokens)
        for row, text in enumerate(texts):
            tokens[row, : len(text)], mask[row, : len(text)] = text, 1
        return session.run(["logits"], {"input_ids": tokens, "attention_mask": mask})[0]

    return answers


def probabilities(answers: Answers, texts: list[np.ndarray]) -> np.ndarray:
    """float64[texts, labels]."""
    rows = {}
    for batch in batches_by_length(np.array([len(text) for text in texts])):
        logits = torch.from_numpy(answers([texts[i] for i in batch]))
        rows |= dict(zip(batch.tolist(), logits.double().softmax(-1).numpy(), strict=True))
    return np.array([rows[i] for i in range(len(texts))])


def timed(path: Path, texts: list[np.ndarray], batch: list[int], threads: int) -> Iterator:
    """Turns of calls with so many texts, each call the next ones, and with all of them by length."""

    def ready():
        answers, calls = opened(path, threads), {}
        for number in batch:
            groups = itertools.cycle([texts[i : i + number] for i in range(0, len(texts) - number + 1, number)])
            calls[f"{number} texts"] = lambda groups=groups: answers(next(groups))
        return calls | {"all": lambda: probabilities(answers, texts)}

    return turns(ready)


def texts_of(run: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """Tokens and labels of dev of the run's own task."""
    trained = configs.load(TrainConfig, [str(run / "config.yaml")])
    task, shape = open_task(trained.task, trained.data), load_model(run / "model").shape
    source, _ = task_source(task, "dev", load_tokenizer(run / "model" / "tokenizer.json"), shape.max_length)
    return [source.sequence(i) for i in range(len(source))], source.labels


def of_run(run: Path, config: QuantConfig, progress: Progress) -> Iterator[dict]:
    texts, labels = texts_of(run)
    some = [texts[i] for i in np.random.default_rng(config.seed).permutation(len(texts))[:AT_ONCE]]
    if len(some) < max(config.batch):
        raise InputError(f"{run}: has {len(some)} dev texts, fewer than batch={config.batch} asks for at once")
    row = partial(rounds.row, "quant", run.name)
    with tempfile.TemporaryDirectory() as folder:
        forms = forms_of(load_model(run / "model"), config.forms)
        paths = {form: write(run, form, Path(folder) / form) for form in forms}
        plain = None
        for form, path in paths.items():
            shares = probabilities(opened(path, config.threads), texts)
            plain = shares if plain is None else plain
            found = scores(shares, labels)
            for metric in ("accuracy", "macro_f1", "calibration_error", "loss"):
                yield row(form, metric, found[metric], "number" if metric == "loss" else "percent", 1)
            yield row(form, f"answers of {forms[0]}", (shares.argmax(1) == plain.argmax(1)).mean(), "percent", 1)
            yield row(form, "file", path.stat().st_size / 1e6, "MB", 1)
        contestants = {form: partial(timed, path, some, config.batch, config.threads) for form, path in paths.items()}
        records = rounds.contest(
            run.name, contestants, config.seconds, config.threads, ["tlm.benches.quant"], progress
        )  # fmt: skip
    for form, record in records.items():
        row_of_form = partial(row, form, runs=len(record.turns))
        for number in config.batch:
            spent = median(turn[f"{number} texts"] for turn in record.turns)
            yield row_of_form(f"{number} texts", value=1e6 * spent, unit="us")
        yield row_of_form("throughput", value=len(some) / median(turn["all"] for turn in record.turns), unit="texts/s")
        base = records[forms[0]].turns
        shares = [of_base["all"] / turn["all"] for of_base, turn in zip(base, record.turns, strict=True)]
        yield row_of_form(f"throughput beside {forms[0]}", value=median(shares), unit="x")


def bench(config: QuantConfig) -> int:
    """A table a run; what is measured so far is in `out` after each."""
    if unknown := next((form for form in config.forms if form not in FORMS), None):
        raise InputError(f"forms=[{unknown}]: no such form; use some of {', '.join(FORMS)}")
    config = replace(config, threads=config.threads or torch.get_num_threads())
    runs = [open_run(run, config.threads).folder for run in config.runs]  # raises where one is not whole
    torch.set_num_threads(config.threads)
    progress, rows = Progress(), []
    for run in runs:
        new = list(of_run(run, config, progress))
        rows += new
        if config.out:
            write_json(Path(config.out), {"machine": environment() | {"threads": config.threads}, "rows": rows})
        rounds.show(new, "metric", "engine")
    return 0
