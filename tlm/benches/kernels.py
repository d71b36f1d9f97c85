"""`tlm bench kernels`: the CPU kernels beside their rivals, in turns in one run.

linear: one matrix product, by rows and width of the model; model: the classifier on texts of one length; adamw: a step
of the optimizer. A turn's figure is the processor time of a call, of all its threads together, so that what else the
machine does counts as little as it can; with threads=1 it is what an idle core would take.
"""

import importlib.util
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tasks.errors import InputError
from tlm.batches import pack as pack_texts
from tlm.benches import rounds
from tlm.config import SIZES, KernelsConfig
from tlm.lowbit.cpu import build
from tlm.lowbit.cpu.packed import linear, pack
from tlm.lowbit.inference import BITS, pack_model
from tlm.lowbit.recipes import RECIPES
from tlm.model import ModelShape, Transformer
from tlm.progress import Progress
from tlm.run import environment, write_json

LEAST_SECONDS = 0.02  # of calls in a turn, however short one is
PARAMETER = 2**20  # numbers of each of the optimizer's parameters


def per_call(function: Callable[[], object]) -> float:
    """Seconds of processor time of a call, over at least LEAST_SECONDS of them."""
    calls, start = 0, time.process_time()
    while (spent := time.process_time() - start) < LEAST_SECONDS:
        function()
        calls += 1
    return spent / calls


def turns(ready: Callable[[], dict[str, Callable]], each: Callable[[Callable], float] = per_call) -> Iterator:
    """What each call of `ready` takes, by its name, again and again; made after the imports."""
    yield
    with torch.inference_mode():
        calls = ready()
    while True:
        with torch.inference_mode():  # left before a yield: it would hold for whoever asked
            taken = {name: each(function) for name, function in calls.items()}
        yield taken


# --- one product ----------------------------------------------------------------------------------------------------


def shapes(config: KernelsConfig) -> dict[str, tuple[int, int, int]]:
    """rows, inputs, outputs of the widest product of a layer: queries, keys and values."""
    return {f"{rows} x {h} x {3 * h}": (rows, h, 3 * h) for h in config.hidden for rows in config.rows}


def products(config: KernelsConfig, make: Callable[[torch.Tensor], Callable]) -> Iterator:
    def ready():
        generator, calls = torch.Generator().manual_seed(config.seed), {}
        for name, (rows, inputs, outputs) in shapes(config).items():
            x, w = (torch.randn(n, inputs, generator=generator) for n in (rows, outputs))
            calls[name] = partial(make(w / inputs**0.5), x)
        return calls

    return turns(ready)


def by_torch(w: torch.Tensor) -> Callable:
    return lambda x: F.linear(x, w)


def by_torch_int8(w: torch.Tensor) -> Callable:
    plain = nn.Sequential(nn.Linear(w.shape[1], w.shape[0], bias=False))
    plain[0].weight = nn.Parameter(w.clone(), requires_grad=False)
    return dynamic_int8(plain)


def dynamic_int8(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings(action="ignore"):  # of its deprecation
        return torch.ao.quantization.quantize_dynamic(module, {nn.Linear})


def by_kernel(w: torch.Tensor, precision: str, instructions: str | None = None) -> Callable:
    packed = pack(RECIPES[precision].weight(w), BITS[precision])
    return lambda x: linear(x, packed, instructions=instructions)


def linear_case(config: KernelsConfig, progress: Progress) -> Iterator[dict]:
    makers = {"torch fp32": by_torch, "torch int8": by_torch_int8}
    makers |= {f"tlm {precision}": partial(by_kernel, precision=precision) for precision in BITS}
    if build.instruction_sets()[:1] != ["avx2"] and build.kernels("avx2"):
        older = {f"tlm {p}, avx2": partial(by_kernel, precision=p, instructions="avx2") for p in ("int8", "ternary")}
        makers |= older
    records = contest(
        "linear", {name: partial(products, config, make) for name, make in makers.items()}, config, progress
    )
    yield from times("linear", records, "torch fp32", "us")
    for name, (_, inputs, outputs) in shapes(config).items():
        w = torch.randn(outputs, inputs)
        for precision, bits in BITS.items():
            held = pack(RECIPES[precision].weight(w), bits).num_bytes
            yield rounds.row(
                "kernels",
                f"linear {name}",
                f"tlm {precision}",
                "fp32 weights' bytes over these",
                w.nbytes / held,
                "x",
                1,
            )


# --- a model --------------------------------------------------------------------------------------------------------


def start_model(config: KernelsConfig, recipe: str | None = None) -> Transformer:
    hidden, layers, heads, intermediate = SIZES[config.size]
    shape = ModelShape(
        config.vocabulary, hidden, layers, heads, intermediate, max(128, config.length), 4, recipe=recipe
    )
    return Transformer(shape, torch.Generator().manual_seed(config.seed), "scaled").eval()


def texts(config: KernelsConfig, count: int) -> np.ndarray:
    """[count, length]: one length, so that rivals have nothing to pad."""
    return np.random.default_rng(config.seed).integers(5, config.vocabulary, (count, config.length))


def by_model(config: KernelsConfig, change: Callable[[], Transformer]) -> Iterator:
    def ready():
        model = change()
        batches = {f"{n} texts": pack_texts(list(texts(config, n))) for n in config.batch}
        return {name: partial(lambda b: model.classify(model(b), b), batch) for name, batch in batches.items()}

    return turns(ready)


def packed(config: KernelsConfig, precision: str) -> Transformer:
    model = start_model(config, precision if precision in ("ternary", "binary") else None)
    pack_model(model, precision)
    return model


def dynamic(config: KernelsConfig) -> nn.Module:
    return dynamic_int8(start_model(config))


def by_onnx(config: KernelsConfig, int8: bool) -> Iterator:
    import onnxruntime

    from tlm.onnx_graph import to_int8, write

    def ready():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            write(start_model(config), path)
            if int8:
                to_int8(path)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = config.threads
            session = onnxruntime.InferenceSession(path.read_bytes(), options)
        feeds = {f"{n} texts": texts(config, n) for n in config.batch}
        return {
            name: partial(session.run, None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
            for name, ids in feeds.items()
        }

    return turns(ready)


def model_case(config: KernelsConfig, progress: Progress) -> Iterator[dict]:
    contestants = {
        "tlm fp32": partial(by_model, config, partial(start_model, config)),
        "torch int8": partial(by_model, config, partial(dynamic, config)),
    }
    contestants |= {f"tlm {p}": partial(by_model, config, partial(packed, config, p)) for p in BITS}
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
        contestants |= {
            name: partial(by_onnx, config, int8) for name, int8 in (("onnx fp32", False), ("onnx int8", True))
        }
    yield from times("model", contest(f"model {config.size}", contestants, config, progress), "tlm fp32", "us")


# --- the optimizer --------------------------------------------------------------------------------------------------


def steps(config: KernelsConfig, kind: Callable[[], Callable]) -> Iterator:
    """One step a call, of parameters whose gradients stay the same."""

    def ready():
        calls = {}
        for millions in config.parameters:
            parameters = [nn.Parameter(torch.randn(PARAMETER)) for _ in range(millions)]
            for p in parameters:
                p.grad = torch.randn_like(p)
            calls[f"{millions}M"] = make(parameters)
        return calls

    def once(optimizer) -> float:
        start = time.process_time()
        optimizer.step()
        return time.process_time() - start

    make = kind()
    yield
    calls = ready()
    while True:
        spent = {name: once(optimizer) for name, optimizer in calls.items()}
        yield spent | {f"{name} state": state_bytes(optimizer) for name, optimizer in calls.items()}


def state_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Bytes a parameter."""
    held = [t for state in optimizer.state.values() for name, t in state.items() if not name.startswith("qmap")]
    return sum(t.nbytes for t in held if isinstance(t, torch.Tensor)) / sum(p.numel() for p in optimizer.state)


def fused() -> Callable:
    return partial(torch.optim.AdamW, lr=1e-3, fused=True)


def eight_bits() -> Callable:
    from tlm.optimizers import AdamW8bit

    def make(parameters: list) -> torch.optim.Optimizer:
        optimizer = AdamW8bit([dict(params=parameters)])
        optimizer.param_groups[0]["lr"] = 1e-3
        return optimizer

    return make


def bitsandbytes() -> Callable:
    from tlm.optimizers import bitsandbytes_adamw8bit

    return partial(bitsandbytes_adamw8bit(), lr=1e-3)


def adamw_case(config: KernelsConfig, progress: Progress) -> Iterator[dict]:
    kinds = {"torch fused fp32": fused, "tlm 8-bit": eight_bits}
    if importlib.util.find_spec("bitsandbytes"):
        kinds["bitsandbytes 8-bit"] = bitsandbytes
    records = contest("adamw", {name: partial(steps, config, kind) for name, kind in kinds.items()}, config, progress)
    for name, record in records.items():
        for millions in config.parameters:
            value = record.turns[-1][f"{millions}M state"]
            yield rounds.row("kernels", f"adamw {millions}M", name, "bytes of state a parameter", value, "number", 1)
        for taken in record.turns:
            for key in [key for key in taken if key.endswith("state")]:
                taken.pop(key)
    yield from times("adamw", records, "torch fused fp32", "s")


# --- the command ----------------------------------------------------------------------------------------------------

CASES = {"linear": linear_case, "model": model_case, "adamw": adamw_case}


def contest(title: str, contestants: dict, config: KernelsConfig, progress: Progress) -> dict[str, rounds.Record]:
    return rounds.contest(title, contestants, config.seconds, config.threads, ["tlm.benches.kernels"], progress)


def times(bench: str, records: dict[str, rounds.Record], baseline: str, unit: str) -> Iterator[dict]:
    """Medians over rounds, of times and of times as many as the baseline's of the same round."""
    of_baseline, scale = records[baseline].turns, 1e6 if unit == "us" else 1
    for name, record in records.items():
        for case in record.turns[0]:
            row = partial(rounds.row, "kernels", f"{bench} {case}", name, runs=len(record.turns))
            taken = [turn[case] for turn in record.turns]
            shares = [base[case] / t for base, t in zip(of_baseline, taken, strict=True)]
            yield row("time", scale * median(taken), unit)
            yield row(f"speed beside {baseline}", median(shares), "x")


def bench(config: KernelsConfig) -> int:
    """Runs the cases and shows tables of each; what is measured so far is in `out` after each case."""
    if unknown := next((case for case in config.cases if case not in CASES), None):
        raise InputError(f"cases=[{unknown}]: no such case; use some of {', '.join(CASES)}")
    config = replace(config, threads=config.threads or torch.get_num_threads())
    progress, rows = Progress(), []
    found = build.find()
    machine = environment() | {"threads": config.threads, "instructions": build.instruction_sets()}
    if isinstance(found, build.NoKernels):
        raise InputError(f"no CPU kernels to measure: {found}")
    for case in config.cases:
        new = list(CASES[case](config, progress))
        rows += new
        if config.out:
            write_json(Path(config.out), {"machine": machine, "rows": rows})
        rounds.show(new, "case", "engine")
    return 0
