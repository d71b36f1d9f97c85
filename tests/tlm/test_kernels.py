"""The GPU's kernels against their torch twins: carried out by Triton's interpreter, and compiled ahead of time; or on a
GPU, with TRITON_INTERPRET=0."""

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tasks.errors import InputError
from tlm.batches import pack
from tlm.benches import gpu_kernels
from tlm.cli import main
from tlm.lowbit import linear
from tlm.lowbit.quantise import E4M3, E5M2, ROW, TENSOR, TINY, Cast, Quantised
from tlm.lowbit.recipes import RECIPES
from tlm.lowbit.sqnr import operands, sqnr_db
from tlm.model import ModelShape, Transformer
from tlm.objectives import Losses

triton = pytest.importorskip("triton", reason="triton is not installed: the extra lowbit has it, on Linux")
INTERPRETED = triton.knobs.runtime.interpret
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("TRITON_INTERPRET is not 1: kernels would need a GPU", allow_module_level=True)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SUMS = 1e-6 if INTERPRETED else 2.0**-11  # of the magnitudes: on sm_90 the tensor cores add with about 14 bits

import triton.language as tl  # noqa: E402

from tlm.lowbit.kernels import linear as kernels  # noqa: E402
from tlm.lowbit.kernels.linear import Products  # noqa: E402
from tlm.lowbit.kernels.matmul import product  # noqa: E402
from tlm.lowbit.kernels.quantise import Gated, Normed, Plain, quantise  # noqa: E402
from tlm.lowbit.kernels.rounding import NATIVE, rounded  # noqa: E402

FORMATS = {"e4m3": E4M3, "e5m2": E5M2}
BLOCKS = {"tensor": TENSOR, "row": ROW, "across": (1, 128), "square": (128, 128)}
ON_GPU = ("fp8-tensorwise", "fp8-rowwise", "fp8-blockwise")


def numbers(rows, columns, seed=0, dtype=torch.float32):
    """Normal numbers of magnitudes from 1e-4 to 1e4."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    return (x * 10 ** (torch.rand(rows, columns, generator=generator) * 8 - 4)).to(DEVICE, dtype)


def same(found: Quantised, cast: Cast, x: torch.Tensor) -> None:
    """To the bit what `cast` makes of x, NaN scales among them; on the CPU, as torch's division on a GPU is by a
    reciprocal."""
    right = cast(x.float().cpu())
    assert found.block == right.block
    assert found.values.device.type == found.scales.device.type == DEVICE.type
    assert torch.equal(found.values.view(torch.uint8).cpu(), right.values.view(torch.uint8))
    assert torch.equal(found.scales.isnan().cpu(), right.scales.isnan())
    assert torch.equal(found.scales.cpu().nan_to_num(-1.0), right.scales.nan_to_num(-1.0))


def place(values: torch.Tensor) -> torch.Tensor:
    """Numbers of 8 bits, counted from zero upwards and downwards; -0 is 0."""
    bits = values.view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)


# --- rounding, apart from all else ----------------------------------------------------------------------------------


@triton.jit
def round_all(x, out, N, FORMAT: tl.constexpr, NATIVE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, rounded(tl.load(x + at, mask=at < N, other=0.0), FORMAT, NATIVE), mask=at < N)


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_torchs_for_every_bfloat16_and_beside_every_middle(name):
    """The middles between neighbours of the format, and the float32 next to them on both sides; the numbers themselves
    and those next to them; and what the interpreter's own cast gets wrong."""
    form = FORMATS[name]
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    known = torch.arange(256, dtype=torch.uint8).view(form.dtype).float()
    known = known[known.isfinite()].sort().values
    edges = torch.cat([known, (known[1:] + known[:-1]) / 2])
    beside = [edges.nextafter(torch.tensor(way)) for way in (-torch.inf, torch.inf)]
    x = torch.cat([every, edges, *beside, torch.tensor([31.73, -31.73])])
    right = x.clamp(-form.largest, form.largest).nan_to_num(nan=0.0).to(form.dtype)
    for native in {False, NATIVE}:  # the integers' way and, on a GPU, the hardware's
        out = torch.empty(len(x), dtype=torch.uint8, device=DEVICE)
        round_all[(triton.cdiv(len(x), 2**14),)](x.to(DEVICE), out, len(x), name, native, 2**14)
        assert torch.equal(out.cpu(), right.view(torch.uint8))
        assert out[-2:].view(form.dtype).float().tolist() == [32.0, -32.0]


# --- quantise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "block", "shape"), itertools.product(FORMATS, BLOCKS, [(70, 131), (96, 144)]))
def test_values_and_those_of_the_transpose_to_the_bit(form, block, shape):
    """Odd shapes and multiples of 16, for which other code is compiled; a row and a column of zeros, infinity, NaN and
    numbers too small for a scale."""
    cast = Cast(FORMATS[form], BLOCKS[block])
    x = numbers(*shape)
    x[3], x[:, 5], x[7, 9:], x[9] = 0, 0, -0.0, 1e-41
    if block != "tensor":
        x[11, 13], x[69, 130] = torch.inf, torch.nan
    found, turned = quantise(Plain(x), cast, turned=True)
    same(found, cast, x)
    same(turned, cast, x.T)


def test_any_strides_and_bfloat16():
    cast = Cast(E4M3, ROW)
    x = numbers(40, 60, dtype=torch.bfloat16)
    for view in (x.T, x[::3, 1::2], x[:1], x[:, :1]):
        found, turned = quantise(Plain(view), cast, turned=True)
        same(found, cast, view)
        same(turned, cast, view.T)
        assert found.values.stride(0) % 16 == turned.values.stride(0) % 16 == 0


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_that_no_scale_fits_are_counted_once(block):
    x = numbers(300, 260)
    x[:140], x[:3, :2], x[299, 259], x[145] = 0, 1, torch.nan, 1e-41
    odd = tuple(torch.full((), 5, dtype=torch.int64, device=DEVICE) for _ in range(2))
    scales = quantise(Plain(x), Cast(E4M3, BLOCKS[block]), True, odd)[0].scales
    assert [int(number) - 5 for number in odd] == [int((scales == TINY).sum()), int(scales.isnan().sum())]
    assert int(odd[1]) > 5
    assert block == "tensor" or int(odd[0]) > 5


@pytest.mark.parametrize("what", [torch.inf, torch.nan])
def test_what_is_not_finite_makes_the_one_scale_nan(what):
    x = numbers(5, 7)
    x[2, 3] = what
    same(quantise(Plain(x), Cast(E5M2, TENSOR))[0], Cast(E5M2, TENSOR), x)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_norm_or_a_geglu_is_taken_in(block):
    """Sums come in another order, so that a number beside a middle may be rounded the other way: by one place."""
    cast = Cast(E4M3, BLOCKS[block])
    x, weight = numbers(37, 50).clamp(-30, 30), torch.rand(50).to(DEVICE) + 0.5
    weight[7] = 0
    for source, right in (
        (Normed.of(x, weight, 1e-5), F.layer_norm(x, (50,), weight, None, 1e-5)),
        (Gated(x), F.gelu(x[:, :25]) * x[:, 25:]),
    ):
        torch.testing.assert_close(source.numbers(), right)
        for found, twin in zip(quantise(source, cast, turned=True), (cast(right), cast(right.T)), strict=True):
            torch.testing.assert_close(found.scales, twin.scales, rtol=2e-6, atol=0)
            apart = (place(found.values) - place(twin.values)).abs()
            assert apart.max() <= 1
            assert (apart > 0).float().mean() < 0.01


# --- products -------------------------------------------------------------------------------------------------------

PAIRS = [("tensor", "tensor"), ("row", "row"), ("across", "square"), ("across", "across")]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_products_of_every_kind_of_scale(pair):
    """e5m2 with e4m3; the sum of one number, of a part of a promotion, of one and a part; more tiles than one."""
    for M, P, L in ((70, 5, 1), (3, 66, 130)):
        a, b = Cast(E5M2, BLOCKS[pair[0]])(numbers(M, L)), Cast(E4M3, BLOCKS[pair[1]])(numbers(P, L, seed=1))
        right = a.dequantised().double() @ b.dequantised().double().T
        size = a.dequantised().double().abs() @ b.dequantised().double().abs().T
        assert ((product(a, b).double() - right).abs() <= SUMS * size).all()
        assert product(a, b, torch.bfloat16).dtype == torch.bfloat16


def test_nan_and_zero_blocks_in_a_product():
    """NaN reaches the rows of its block and no other; and scales whose product would be infinite beside zeros."""
    x, w = numbers(8, 140), numbers(6, 140, seed=1)
    x[2, 5], x[4] = torch.nan, 0
    found = product(Cast(E4M3, (1, 128))(x), Cast(E4M3, (128, 128))(w))
    assert found.isnan().any(1).nonzero().flatten().tolist() == [2]
    assert found[2].isnan().all()
    assert (found[4] == 0).all()
    a, b = (Cast(E4M3, ROW)(torch.tensor([row], device=DEVICE)) for row in ([3e38, 0.0], [0.0, 3e38]))
    assert product(a, b).item() == 0


# --- a Linear and a model -------------------------------------------------------------------------------------------


def with_gradients(function, leaves, g):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, g)


@pytest.mark.parametrize(("name", "kind"), itertools.product(ON_GPU, ("plain", "norm", "geglu")))
def test_output_and_every_gradient_are_the_twins(name, kind):
    recipe, odd = RECIPES[name], Counter()
    x, w, g = (t.to(DEVICE) for t in operands(33, 40, 35))
    norm = [torch.rand(40).to(DEVICE) + 0.5] if kind == "norm" else []
    x = torch.cat([x, x.flip(0)], 1) if kind == "geglu" else x
    before = {
        "plain": lambda x: x,
        "norm": lambda x, weight: F.layer_norm(x, (40,), weight, None, 1e-5),
        "geglu": lambda x: F.gelu(x[:, :40]) * x[:, 40:],
    }[kind]

    def kernels(x, w, weight=None):
        return Products.apply(kind, x, w, weight, 1e-5, recipe, odd, True)

    def twin(x, w, *norm):
        return linear.Products.apply(before(x, *norm), w, recipe, None, Counter())

    for found, right in zip(*(with_gradients(f, [x, w, *norm], g) for f in (kernels, twin)), strict=True):
        assert sqnr_db(right, found) > 60 - 10 * (not INTERPRETED)  # 120 but for numbers rounded the other way
    assert len(odd) == 6
    assert not sum(int(number) for number in odd.values())


SHAPE = ModelShape(50, 32, 1, 2, 40, 16, 3, recipe="fp8-blockwise")


def test_a_model_trains_through_the_kernels_as_through_their_twins(monkeypatch):
    """As on a GPU: norms and GeGLU taken in, but where dropout comes between."""
    texts = [torch.randint(5, 50, (length,), generator=torch.Generator().manual_seed(length)) for length in (9, 16, 9)]
    batch = pack([text.numpy() for text in texts], [text.numpy() for text in texts], [0, 1, 2]).to(DEVICE)
    asked = Counter()
    apply = Products.apply

    def noted(kind, *rest):
        asked[kind] += 1
        return apply(kind, *rest)

    monkeypatch.setattr(Products, "apply", noted)

    def gradients():
        model = Transformer(SHAPE, torch.Generator().manual_seed(0), "scaled").to(DEVICE)
        sum(Losses(model)(batch, True, True)).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    monkeypatch.setattr(linear, "has_kernels", lambda device: False)
    right = gradients()
    assert not asked
    monkeypatch.setattr(linear, "has_kernels", lambda device: True)
    found = gradients()
    assert asked == {"plain": 2, "norm": 1, "geglu": 1}  # the embedding has its own norm; attention comes before its Wo
    least = {name: sqnr_db(right[name], found[name]) for name in right}
    assert min(least.values()) > (50 if INTERPRETED else 25), least
    asked.clear()
    with torch.no_grad():
        Transformer(replace(SHAPE, dropout=0.5), torch.Generator().manual_seed(0)).to(DEVICE)(batch)
    assert asked == {"plain": 3, "norm": 1}


def test_nothing_is_kept_for_a_backward_pass_that_does_not_come(monkeypatch):
    monkeypatch.setattr(linear, "has_kernels", lambda device: True)
    asked = []
    monkeypatch.setattr(kernels, "quantise", lambda *a: asked.append(a[2]) or quantise(*a))
    layer, x = linear.Linear(32, 32, True, "fp8-blockwise").to(DEVICE), torch.randn(2, 3, 32).to(DEVICE)
    with torch.no_grad():
        layer(x)
    assert asked == [False, False]
    layer(x).sum().backward()
    assert asked[2:] == [True, False, True]  # inputs; weights, as no gradient of inputs is asked for; gradients
    assert linear.after_norm(nn.Identity(), nn.Linear(4, 4), torch.ones(1, 4)).shape == (1, 4)


# --- the bench ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the bench itself can be run")
def test_the_bench_takes_turns_among_contestants_that_compute_the_same():
    """With a clock that lets each compute and tells a second: cuBLAS's and torch's own products are those of a CPU."""
    turns = []
    rows = {}
    for kind in ("product", "linear"):
        for row in gpu_kernels.of_case(
            kind, kind, (16, 32, 48), 2, torch.device("cpu"), lambda run: turns.append(run) or 1.0
        ):
            rows[kind, row["engine"], row["metric"]] = row["value"]
    ours = {f"ours {name}" for name in ON_GPU}
    theirs = {f"torch._scaled_mm {name}" for name in ON_GPU[:2]}
    assert {engine for kind, engine, _ in rows if kind == "product"} == {"bf16 cuBLAS"} | ours | theirs
    assert {engine for kind, engine, _ in rows if kind == "linear"} == {"bf16 cuBLAS"} | ours
    assert all(value > 23 for (*_, metric), value in rows.items() if metric == "least SQNR")
    assert rows["product", "ours fp8-rowwise", "speed"] == 2 * 16 * 32 * 48 / 1e12
    assert rows["linear", "ours fp8-rowwise", "speed"] == pytest.approx(6 * 16 * 32 * 48 / 1e12)
    assert [turns[11], *turns[6:11]] == turns[:6]  # the second round begins with the second contestant
    assert len(turns) == 2 * (6 + 4)


def test_a_broken_result_is_not_passed_over():
    assert gpu_kernels.least([28.5, float("nan"), 24.6]) != gpu_kernels.least([28.5, 24.6]) == 24.6


@pytest.mark.parametrize("shape", ["8192x4096", "8x0x4", "axbxc"])
def test_a_shape_that_is_none_is_one_sentence(shape):
    with pytest.raises(InputError, match=f"shapes={shape}: not rows x inputs x outputs"):
        gpu_kernels.sizes_of(shape)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_bench_is_one_sentence(capsys):
    assert main(["bench", "gpu-kernels"]) == 2
    assert capsys.readouterr().err.startswith("tlm: bench gpu-kernels: no GPU answers here; ")


# --- compiled -------------------------------------------------------------------------------------------------------

COMPILED = """
import json, sys
from dataclasses import asdict
from tlm.lowbit.kernels.compiled import cases, compiled, launches
chosen = cases()
for case, kernel, places in json.loads(sys.argv[2]):
    found = [launch for launch in launches(chosen[case]) if launch.kernel.__name__ == kernel]
    for place in places:
        print(json.dumps(asdict(compiled(found[place], int(sys.argv[1]), case))))
"""
# Products of a case are those of the output, the inputs' gradient and the weights' gradient.
CASES = [
    ("fp8-blockwise even", "scaled_matmul", [0, 2]), ("fp8-rowwise even", "scaled_matmul", [1]),
    ("fp8-rowwise odd", "scaled_matmul", [0]), ("fp8-rowwise geglu", "find_largest", [0]),
    ("fp8-rowwise geglu", "quantise_tile", [0]), ("fp8-blockwise norm", "statistics", [0]),
    ("fp8-blockwise norm", "quantise_tile", [0]),
]  # fmt: skip
PRODUCTS = {
    90: ["e4m3.e4m3", "e4m3.e4m3", "e5m2.e4m3", "e4m3.e4m3"],
    100: ["kind::f8f6f4"] * 4,  # which of the formats is told at run time
}


@pytest.mark.parametrize("capability", PRODUCTS)
def test_compiled_ahead_of_time_to_tensor_cores_without_spills(capability, tmp_path):
    """What can be known without a GPU. Limits of both targets: 255 registers a thread, 65,536 and 227 KiB a program."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILED, str(capability), json.dumps(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    binaries = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(binaries) == 8
    products = []
    for binary in binaries:
        assert binary["stack_bytes"] == 0, binary
        assert binary["registers"] <= 255
        assert binary["registers"] * binary["threads"] <= 65536
        assert binary["shared_bytes"] <= 227 * 1024
        if binary["kernel"] == "scaled_matmul":
            (name,) = binary["products"]
            assert name.startswith({90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability])
            products.append(name.split(".f32." if capability == 90 else ".")[-1])
        if binary["kernel"] == "quantise_tile":
            assert binary["conversions"] == ["cvt.rn.satfinite.e4m3x2.f32"]  # the hardware's own
    assert products == PRODUCTS[capability]
