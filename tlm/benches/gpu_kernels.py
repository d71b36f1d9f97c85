"""`tlm bench gpu-kernels`: the FP8 kernels beside cuBLAS in bf16, torch._scaled_mm and torchao, in turns on one GPU.

Two questions. "product": one product of operands that are already in 8 bits. "linear": the output and both gradients of
a Linear from inputs and gradients in bf16, all that has to be quantised on the way with them. Each contestant's error
against float64 is told beside its speed, so that a fast wrong answer is seen.
"""

import functools
import importlib.util
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tasks.errors import InputError
from tlm.benches.rounds import row, show
from tlm.config import GpuKernelsConfig
from tlm.lowbit.conversion import ON_GPU, check_gpu
from tlm.lowbit.recipes import RECIPES
from tlm.lowbit.sqnr import operands, sqnr_db
from tlm.progress import Progress
from tlm.run import environment, write_json

# Computes once, and returns the output, or output and both gradients.
Contestant = Callable[[], tuple[torch.Tensor, ...]]


def bench(config: GpuKernelsConfig) -> int:
    if not torch.cuda.is_available():
        raise InputError("bench gpu-kernels: no GPU answers here; run it on a machine with one (see `tlm doctor`)")
    device, progress, rows = torch.device("cuda"), Progress(), []
    check_gpu(f"precision={ON_GPU[0]}", device)
    cases = [(kind, sizes_of(text)) for text in config.shapes for kind in ("product", "linear")]
    with progress.phase("gpu-kernels", len(cases)):
        for done, (kind, sizes) in enumerate(cases):
            name = f"{kind} {' x '.join(map(str, sizes))}"
            progress.update(done, len(cases), name)
            rows += of_case(name, kind, sizes, config.rounds, device, seconds_on_gpu)
            if config.out:
                write_json(Path(config.out), {"machine": environment(), "rows": rows})
    show(rows, "engine", "metric")
    return 0


def sizes_of(text: str) -> tuple[int, int, int]:
    """rows x inputs x outputs."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise InputError(f"shapes={text}: not rows x inputs x outputs; write it as 8192x4096x4096")
    return tuple(int(part) for part in parts)


def of_case(name: str, kind: str, sizes: tuple, rounds: int, device: torch.device, clock: Callable) -> list[dict]:
    """Rows for one shape: TFLOP/s (the median round) and dB of each contestant."""
    contestants, right = {"product": products, "linear": linears}[kind](*sizes, device)
    flops = 2 * sizes[0] * sizes[1] * sizes[2] * len(right)
    names, took = list(contestants), {engine: [] for engine in contestants}
    errors = {engine: least(sqnr_db(a, b) for a, b in zip(right, run(), strict=True))
              for engine, run in contestants.items()}  # fmt: skip
    for _ in range(rounds):
        for engine in names:
            took[engine].append(clock(contestants[engine]))
        names.append(names.pop(0))
    rows = []
    for engine in contestants:
        speed = flops / statistics.median(took[engine]) / 1e12
        rows.append(row("gpu-kernels", name, engine, "speed", speed, "TFLOP/s", rounds))
        rows.append(row("gpu-kernels", name, engine, "least SQNR", errors[engine], "dB", rounds))
    return rows


def least(numbers: Iterable[float]) -> float:
    """The smallest; NaN where one of them is, which `min` may pass over."""
    return float(np.min(list(numbers)))


def seconds_on_gpu(run: Contestant, repeats: int = 10) -> float:
    """Of one run, by the GPU's own clock, after one that warms up."""
    run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def products(N: int, K: int, O: int, device: torch.device) -> tuple[dict[str, Contestant], tuple[torch.Tensor]]:  # noqa: E741
    """x [N, K] by w [O, K], in bf16 out; and the product in float64."""
    from tlm.lowbit.kernels.matmul import product
    from tlm.lowbit.kernels.quantise import Plain, quantise

    x, w, _ = (t.to(device) for t in operands(N, K, O))
    bf16 = x.bfloat16(), w.bfloat16()
    found: dict[str, Contestant] = {"bf16 cuBLAS": lambda: (bf16[0] @ bf16[1].T,)}
    for name in ON_GPU:
        (a, _), (b, _) = quantise(Plain(x), RECIPES[name].inputs), quantise(Plain(w), RECIPES[name].weight)
        found[f"ours {name}"] = lambda a=a, b=b: (product(a, b, torch.bfloat16),)
        if name != "fp8-blockwise" and K % 16 == O % 16 == 0:  # what torch's takes
            scales = (a.scales, b.scales.T) if name == "fp8-rowwise" else (a.scales[0, 0], b.scales[0, 0])
            scaled_mm = functools.partial(torch._scaled_mm, a.values, b.values.T, *scales, out_dtype=torch.bfloat16)
            found[f"torch._scaled_mm {name}"] = lambda scaled_mm=scaled_mm: (scaled_mm(),)
    return found, (x.double() @ w.double().T,)


def linears(N: int, K: int, O: int, device: torch.device) -> tuple[dict[str, Contestant], tuple[torch.Tensor, ...]]:  # noqa: E741
    """Output and gradients of x [N, K] and w [O, K]."""
    from tlm.lowbit.kernels.linear import Products

    x, w, g = (t.to(device) for t in operands(N, K, O))
    leaves, slope = (x.bfloat16().requires_grad_(), w.clone().requires_grad_()), g.bfloat16()

    def trained(function: Callable, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, slope.to(out.dtype))

    plain = leaves[0], w.bfloat16().requires_grad_()
    found: dict[str, Contestant] = {"bf16 cuBLAS": lambda: trained(nn.functional.linear, *plain)}
    for name in ON_GPU:

        def ours(x, w, recipe=RECIPES[name]):
            with torch.autocast(device.type, torch.bfloat16):
                return Products.apply("plain", x, w, None, 0.0, recipe, Counter(), True)

        found[f"ours {name}"] = lambda ours=ours: trained(ours, *leaves)
        if importlib.util.find_spec("torchao") and device.type == "cuda" and name != "fp8-blockwise":
            theirs = by_torchao(w, name.removeprefix("fp8-"), padded=N % 16 > 0)
            found[f"torchao {name}"] = lambda theirs=theirs: trained(lambda x, _: theirs(x), leaves[0], theirs.weight)
    right = trained(nn.functional.linear, x.double().requires_grad_(), w.double().requires_grad_())
    return found, right


def by_torchao(w: torch.Tensor, recipe: str, padded: bool) -> nn.Module:
    """Its Linear, compiled for this shape, as its makers advise; `padded` where the rows are no multiple of 16."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    linear = nn.Linear(w.shape[1], w.shape[0], bias=False, device=w.device, dtype=torch.bfloat16)
    linear.weight.data.copy_(w)
    holder = nn.Sequential(linear)
    config = replace(Float8LinearConfig.from_recipe_name(recipe), pad_inner_dim=padded)
    convert_to_float8_training(holder, config=config)
    torch.compiler.reset()
    holder[0].compile(dynamic=False)
    return holder[0]
