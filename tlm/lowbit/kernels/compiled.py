"""What Triton's compiler makes of kernels, with no GPU: `python -m tlm.lowbit.kernels.compiled [sm_90 sm_100]`.

A function that launches kernels is called with tensors that hold nothing (device "meta"); each launch is written down
and compiled as it would be for these arguments. `cuobjdump`, which comes with Triton, tells what the binary needs.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e5m2: "*fp8e5",
}  # fmt: skip
ALIGNED = 16  # bytes of an address, or an integer: then Triton compiles for its multiples


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    arguments: tuple
    options: dict


@dataclass(frozen=True)
class Binary:
    """What one launch compiles to."""

    kernel: str
    case: str
    target: str  # such as sm_90
    registers: int  # of a thread
    stack_bytes: int  # of a thread: spilled registers lie there
    shared_bytes: int  # of a program
    threads: int  # of a program
    products: tuple[str, ...]  # tensor-core instructions of its PTX
    conversions: tuple[str, ...]  # of numbers to 8 bits


def launches(function: Callable[[], object]) -> list[Launch]:
    """Those of `function`, none of them carried out."""
    found: list[Launch] = []

    def run(kernel, *arguments, grid, warmup, **options):
        found.append(Launch(kernel, arguments, options))

    with mock.patch.object(JITFunction, "run", run):
        function()
    return found


def compiled(launch: Launch, capability: int, case: str = "") -> Binary:
    """`capability`: 90 for sm_90, 100 for sm_100."""
    signature, constants, attributes = {}, {}, {}
    for place, (parameter, value) in enumerate(zip(launch.kernel.params, launch.arguments, strict=True)):
        kind = "constexpr" if parameter.is_constexpr else type_of(value)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(place,)] = value
        elif kind.startswith("*") or (kind == "i32" and value % ALIGNED == 0):
            attributes[(place,)] = [["tt.divisibility", ALIGNED]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    needs, ptx = resources(binary.asm["cubin"]), binary.asm["ptx"]
    return Binary(
        launch.kernel.__name__, case, f"sm_{capability}", needs["REG"], needs["STACK"], binary.metadata.shared,
        32 * binary.metadata.num_warps,
        tuple(sorted(set(re.findall(r"wgmma\.mma_async\S+|tcgen05\.mma\.\S+|mma\.sync\.aligned\.m\S+", ptx)))),
        tuple(sorted(set(re.findall(r"cvt\.rn\S*\.e[45]m[23]x2\.f32", ptx)))),
    )  # fmt: skip


def type_of(value) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "constexpr" if value == 1 else "i32"  # as Triton does


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL and so on: the last is memory of the local space that is no stack."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", told)}


def cases(tokens: int = 4096, inputs: int = 1024, outputs: int = 3072) -> dict[str, Callable[[], object]]:
    """All that a Linear launches under each recipe of fp8, and the fused sources."""
    from tlm.lowbit.kernels.matmul import product
    from tlm.lowbit.kernels.quantise import Gated, Normed, Plain, quantise
    from tlm.lowbit.recipes import RECIPES

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def three_products(name, tokens, inputs, outputs, dtype):
        recipe, odd = RECIPES[name], (empty(dtype=torch.int64), empty(dtype=torch.int64))
        x, x_turned = quantise(Plain(empty(tokens, inputs, dtype=dtype)), recipe.inputs, True, odd)
        w, w_turned = quantise(Plain(empty(outputs, inputs)), recipe.weight, True, odd)
        g, g_turned = quantise(Plain(empty(tokens, outputs, dtype=dtype)), recipe.gradient, True, odd)
        product(x, w, dtype), product(g, w_turned, dtype), product(g_turned, x_turned)

    found = {}
    for name in ("fp8-tensorwise", "fp8-rowwise", "fp8-blockwise"):
        for label, sizes in {"even": (tokens, inputs, outputs), "odd": (1001, 200, 333), "one": (1, 1, 1)}.items():
            found[f"{name} {label}"] = lambda name=name, s=sizes: three_products(name, *s, torch.bfloat16)
        cast, x = RECIPES[name].inputs, empty(tokens, inputs, dtype=torch.bfloat16)
        found[f"{name} norm"] = lambda cast=cast, x=x: quantise(Normed.of(x, empty(inputs), 1e-5), cast, turned=True)
        found[f"{name} geglu"] = lambda cast=cast, x=x: quantise(Gated(x), cast, turned=True)
    return found


def main(targets: list[str]) -> None:
    """A line of JSON for each binary."""
    for case, function in cases().items():
        for launch in launches(function):
            for target in targets:
                print(json.dumps(asdict(compiled(launch, int(target.removeprefix("sm_")), case))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["sm_90", "sm_100"])
