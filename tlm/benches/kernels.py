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
    calls, spent, start = 0, 0.0, time.process_time()
    while spent < LEAST_SECONDS:
        function()
        calls, spent = calls + 1, time.process_time() - start
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


def steps(millions: int, kind: Callable[[], Callable]) -> Iterator:
    """A step of so many parameters, whose gradients stay the same, and the bytes of state of each."""
    make = kind()
    yield
    parameters = [nn.Parameter(torch.randn(PARAMETER)) for _ in range(millions)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer = make(parameters)
    while True:
        start = time.process_time()
        optimizer.step()
        yield {f"{millions}M": time.process_time() - start, "state": state_bytes(optimizer)}


def state_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Bytes a parameter; tables of levels, which all share, left out."""
    held = [t for state in optimizer.state.values() for name, t in state.items() if not name.startswith("qmap")]
    return sum(map(num_bytes, held)) / sum(p.numel() for p in optimizer.state)


def num_bytes(held: object) -> int:
    if hasattr(held, "__tensor_flatten__"):  # torchao's state, which says that it is float32
        return sum(getattr(held, name).nbytes for name in held.__tensor_flatten__()[0] if name != "qmap")
    return held.nbytes if isinstance(held, torch.Tensor) else 0


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


def torchao() -> Callable:
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise InputError("torchao=true: torchao is missing; pip install torchao, or leave the key out") from None
    return partial(AdamW8bit, lr=1e-3)


def adamw_case(config: KernelsConfig, progress: Progress) -> Iterator[dict]:
    kinds = {"torch fused fp32": fused, "tlm 8-bit": eight_bits}
    if importlib.util.find_spec("bitsandbytes"):
        kinds["bitsandbytes 8-bit"] = bitsandbytes
    if config.torchao:
        kinds["torchao 8-bit"] = torchao
    for millions in config.parameters:  # one after the other: memory is that of the largest
        contestants = {name: partial(steps, millions, kind) for name, kind in kinds.items()}
        records = contest(f"adamw {millions}M", contestants, config, progress)
        for name, record in records.items():
            kept = [taken.pop("state") for taken in record.turns][-1]
            yield rounds.row("kernels", f"adamw {millions}M", name, "bytes of state a parameter", kept, "number", 1)
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
