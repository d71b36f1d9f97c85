"""The CPU kernels against their twins in torch, these against formulas, and how a kernel is compiled, or not."""

import math
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from tlm.lowbit.cpu import adamw8bit, build
from tlm.lowbit.cpu.adamw8bit import Rates, dequantised, levels, new_state, quantised, step_by_kernel, step_by_torch
from tlm.lowbit.cpu.packed import linear, linear_by_torch, pack, unpack
from tlm.lowbit.quantise import INT8, ROW, Cast, binary, ternary
from tlm.lowbit.sqnr import sqnr_db

WEIGHTS = {8: Cast(INT8, ROW), 2: ternary, 1: binary}
SHAPES = [(1, 1, 1), (7, 33, 50), (13, 64, 16), (97, 130, 65), (6, 257, 200)]  # rows, inputs, outputs
SETS = list(build.INSTRUCTION_SETS)


@pytest.fixture
def library():
    """A function: skips where an instruction set, or a compiler, is not there."""

    def find(instructions):
        found = build.find(instructions)
        if isinstance(found, build.NoKernels):
            pytest.skip(str(found))
        return found

    return find


@pytest.fixture
def compiler():
    if not build.instruction_sets() or not shutil.which("g++"):
        pytest.skip("no AVX2, or no g++")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the Linear -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", WEIGHTS)
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (33, 50), (64, 16)])
def test_unpacking_gives_what_was_packed(bits, halves, inputs, outputs):
    weight = WEIGHTS[bits](numbers(halves * outputs, inputs))
    packed = pack(weight, bits, halves=halves)
    assert torch.equal(unpack(packed), weight.values)
    padded = math.ceil(inputs / (32 / bits)) * (32 // bits), math.ceil(outputs / 16) * 16
    assert packed.panels.numel() == halves * padded[0] * padded[1] * bits // 8


@pytest.mark.parametrize("bits", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_twin_is_the_product_of_what_the_integers_stand_for(bits, shape):
    x, w, bias = numbers(shape[0], shape[1]), numbers(shape[2], shape[1], seed=1), numbers(shape[2], seed=2)
    weight = WEIGHTS[bits](w)
    exact = WEIGHTS[8](x).dequantised().double() @ weight.dequantised().double().T + bias.double()
    packed = pack(weight, bits, bias)
    torch.testing.assert_close(linear_by_torch(x, packed), exact.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear_by_torch(x, packed, "gelu"), F.gelu(exact).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("bits", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_its_twin(instructions, bits, shape, library):
    """To the bit without an activation, also where sums are as large as they can be."""
    library(instructions)
    rows, inputs, outputs = shape
    x, bias = numbers(rows, inputs), numbers(2 * outputs, seed=2)
    for w in (numbers(2 * outputs, inputs, seed=1), torch.ones(2 * outputs, inputs)):
        for x_ in (x, torch.full_like(x, -3.0)):
            weight = WEIGHTS[bits](w)
            for packed in (pack(weight, bits), pack(weight, bits, bias)):
                assert torch.equal(linear(x_, packed, instructions=instructions), linear_by_torch(x_, packed))
                ours, twin = (f(x_, packed, "gelu", **k) for f, k in pair(instructions))
                torch.testing.assert_close(ours, twin, rtol=1e-6, atol=2e-6)
            gated = pack(weight, bits, bias, halves=2)
            ours, twin = (f(x_, gated, "geglu", **k) for f, k in pair(instructions))
            assert ours.shape == (rows, outputs)
            torch.testing.assert_close(ours, twin, rtol=1e-5, atol=1e-5)


def pair(instructions):
    return (linear, dict(instructions=instructions)), (linear_by_torch, {})


@pytest.mark.parametrize("instructions", SETS)
def test_odd_rows_are_counted_and_as_loud_as_in_fp32(instructions, library):
    library(instructions)
    x = numbers(7, 40)
    x[1], x[2, 3], x[3, :2], x[4] = 0, math.inf, math.nan, 1e-40
    packed, counts = pack(Cast(INT8, ROW)(numbers(20, 40)), 8), [Counter(), Counter()]
    outputs = linear(x, packed, "none", counts[0], instructions), linear_by_torch(x, packed, "none", counts[1])
    torch.testing.assert_close(*outputs, equal_nan=True, rtol=0, atol=0)
    assert outputs[0].isnan().all(1).tolist() == [i in (2, 3) for i in range(7)]
    assert counts[0] == counts[1] == {"input zero blocks": 2, "input blocks with NaN or infinity": 2}
    assert linear(x[:0], packed, instructions=instructions).shape == (0, 20)


def test_two_threads_give_the_same_bits(library):
    library(None)
    x, packed, before = numbers(200, 64), pack(ternary(numbers(150, 64)), 2), torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outputs.append(linear(x, packed, "gelu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outputs)


def test_weights_of_8_bits_lose_little():
    x, w = numbers(64, 256), numbers(96, 256, seed=1)
    assert sqnr_db(x @ w.T, linear(x, pack(Cast(INT8, ROW)(w), 8))) > 35


# --- AdamW ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_levels_and_the_choice_among_them_are_bitsandbytes(signed):
    theirs = pytest.importorskip("bitsandbytes").functional.create_dynamic_map(signed=signed)
    ours = dequantised(torch.arange(256).to(torch.uint8), torch.ones(1), signed)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)
    assert len(levels(signed).values) == (129 if signed else 256)
    shares = numbers(1 << 16).abs() ** 6
    shares = shares / shares.max() * (numbers(1 << 16, seed=1).sign() if signed else 1)
    shares.view(-1, 256)[:, 0] = 1
    codes, scales = quantised(shares, signed)
    nearest = torch.bucketize(shares, (theirs[1:] + theirs[:-1]) / 2)
    if not signed:
        nearest = nearest.clamp(min=1)  # none of these is zero
    assert torch.equal(scales, torch.ones(256))
    assert (codes.int() - nearest).abs().max() <= 1
    assert (codes != nearest).float().mean() < 1e-4  # at the border, within rounding


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("count", [1, 255, 256, 5001])
def test_the_step_is_its_twin_to_the_bit(instructions, count, library):
    """Over 30 steps: gradients of very different sizes, and none at all."""
    library(instructions)
    ours, twin = numbers(count), numbers(count)
    states = new_state(ours), new_state(twin)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 31):
        grad = torch.randn(count, generator=generator) * torch.rand(count, generator=generator) ** 8 * (step % 3 > 0)
        rates = Rates(1e-2, (0.9, 0.98), 1e-8, 0.1, step)
        step_by_kernel(ours, grad, states[0], rates, instructions)
        step_by_torch(twin, grad, states[1], rates)
        assert torch.equal(ours, twin)
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_twin_is_adamw_but_for_the_rounding_of_moments_over_50_steps():
    """By hand in float64, moments rounded to the nearest of bitsandbytes' levels."""
    table = pytest.importorskip("bitsandbytes").functional
    tables = [table.create_dynamic_map(signed=True).double(), table.create_dynamic_map(signed=False).double()[1:]]
    p, generator = numbers(512), torch.Generator().manual_seed(1)
    state, exact, moments = new_state(p), p.double(), [torch.zeros(512, dtype=torch.float64) for _ in range(2)]
    for step in range(1, 51):
        grad = torch.randn(512, generator=generator)
        step_by_torch(p, grad, state, Rates(1e-2, (0.9, 0.98), 1e-8, 0.1, step))
        g = grad.double()
        moments = [0.9 * moments[0] + 0.1 * g, 0.98 * moments[1] + 0.02 * g * g]
        m, v = moments[0] / (1 - 0.9**step), moments[1] / (1 - 0.98**step)
        exact = exact * (1 - 1e-3) - 1e-2 * m / (v.sqrt() + 1e-8)
        for i, of in enumerate(tables):
            blocks = moments[i].view(2, 256)
            top = blocks.abs().amax(1, keepdim=True)
            moments[i] = (of[((blocks / top)[..., None] - of).abs().argmin(-1)] * top).flatten()
    assert (p - exact).norm() < 1e-3 * (p - numbers(512)).norm()


def test_a_word_that_is_rare_beside_a_frequent_one_makes_no_giant_step(library):
    """Its second moment is too small for the block's scale, its first is not, and its next gradients are zero."""
    library(None)
    for step in (step_by_kernel, step_by_torch):
        p, state = torch.zeros(256), new_state(torch.zeros(256))
        for number in range(1, 11):
            grad = torch.zeros(256) if number > 1 else torch.full((256,), 1e-3)
            grad[0] = 10.0
            step(p, grad, state, Rates(1e-2, (0.9, 0.98), 1e-8, 0.0, number))
        assert (state["exp_avg_sq"] > 0).all()
        assert p.abs().max() < 0.2  # ten steps of 0.01 and a little; rounded to zero it is 10


def test_a_gradient_that_is_no_number_is_as_loud_as_in_fp32(library):
    library(None)
    for step in (step_by_kernel, step_by_torch):
        p, grad = numbers(512), numbers(512, seed=1)
        grad[3], state = math.nan, new_state(p)
        step(p, grad, state, Rates(1e-2, (0.9, 0.98), 1e-8, 0.1, 1))
        assert p.isnan().tolist() == [i == 3 for i in range(512)]
        assert state["exp_avg_scales"].isnan().tolist() == [True, False]


def test_a_parameter_in_another_order_in_memory_is_stepped_too():
    ours, plain = numbers(64, 80).T, numbers(64, 80).T.contiguous()
    grad, rates = numbers(80, 64, seed=1), Rates(1e-2, (0.9, 0.98), 1e-8, 0.1, 1)
    for p in (ours, plain):
        adamw8bit.step(p, grad, new_state(p.contiguous()), rates)
    assert torch.equal(ours, plain)


# --- compiling ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Nothing compiled, nothing remembered."""
    monkeypatch.setattr(build, "FOLDER", tmp_path / "kernels")
    build.find.cache_clear()
    yield tmp_path / "kernels"
    build.find.cache_clear()


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [("CXX", "no-such-compiler", "cannot compile|no C\\+\\+ compiler"), ("TLM_KERNELS", "off", "TLM_KERNELS=off")],
)
def test_without_kernels_torch_gives_the_same_numbers(variable, value, reason, fresh, monkeypatch, capsys):
    if not build.instruction_sets():
        pytest.skip("the processor has no AVX2")
    x, packed = numbers(9, 40), pack(ternary(numbers(20, 40)), 2)
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("PATH", "")
    assert torch.equal(linear(x, packed), linear_by_torch(x, packed))
    p, state = numbers(5000), new_state(numbers(5000))
    adamw8bit.step(p, numbers(5000, seed=1), state, Rates(1e-2, (0.9, 0.98), 1e-8, 0.1, 1))
    assert (p != numbers(5000)).any()
    with pytest.raises(build.NoKernels, match=reason):
        build.load(None, fresh)
    told = capsys.readouterr().err
    assert told.count("no CPU kernels") == (variable == "CXX")  # said once, if nobody asked for it
    assert not list(fresh.glob("*.so"))


def test_a_source_that_does_not_compile_leaves_nothing(fresh, monkeypatch, tmp_path, compiler):
    (tmp_path / "broken.cpp").write_text("int f() { return }\n")
    monkeypatch.setattr(build, "SOURCES", (tmp_path / "broken.cpp",))
    with pytest.raises(build.NoKernels, match=r"cannot compile them \(.*error"):
        build.load(None, fresh)
    assert [path.suffix for path in fresh.iterdir()] == [".lock"]


def test_processes_that_want_it_at_once_compile_it_once(tmp_path, compiler):
    (tmp_path / "small.cpp").write_text('extern "C" int answer() { return 42; }\n')
    code = (
        "import sys; from pathlib import Path; from tlm.lowbit.cpu import build; "
        f"build.ARGUMENTS = dict(); build.SOURCES = (Path({str(tmp_path / 'small.cpp')!r}),); "
        "sys.exit(build.load(None, Path(sys.argv[1])).answer() != 42)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "kernels")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    told = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert "".join(told).count("tlm: compiling") == 1
    assert sorted(path.suffix for path in (tmp_path / "kernels").iterdir()) == [".lock", ".so"]


def test_nothing_is_compiled_by_an_import(tmp_path):
    code = "import tlm.optimizers, tlm.lowbit.inference, tlm.lowbit.cpu.build as b; assert not b.find.cache_info()[1]"
    environment = {**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
    assert not (tmp_path / ".cache" / "tlm").exists()
