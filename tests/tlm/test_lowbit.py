"""A Linear by recipe: how near its products stay to fp32, what is converted, how a model trains, runs and exports."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from tasks.errors import InputError
from tlm import config, lowbit
from tlm.batches import IGNORE, pack
from tlm.cli import main
from tlm.lowbit.linear import Linear, Products
from tlm.lowbit.philox import uniforms
from tlm.lowbit.quantise import E4M3, E5M2, INT8, ROW, TENSOR, Cast, ternary
from tlm.lowbit.recipes import RECIPES
from tlm.lowbit.sqnr import SHAPES, of_recipe, of_torchao, operands, sqnr_db
from tlm.model import ModelShape, Transformer, load_model, save_model
from tlm.objectives import Losses
from tlm.optimizers import build_optimizer, parameter_groups

SHAPE = ModelShape(300, 64, 2, 2, 96, 32, 3)

# Least dB of output, input gradient and weight gradient. A rounding error of at most 2^-4 of each number (e4m3) is one
# of 31 dB in the mean for one operand and 28 for two; 2^-3 (e5m2) one of 25 dB.
FLOORS = {
    "fp8-tensorwise": (27.5, 24, 23.5),
    "fp8-delayed": (27.5, 24, 23.5),
    "fp8-rowwise": (28, 24, 23.5),
    "fp8-blockwise": (29, 28, 28.5),
    "mxfp8": (27.5, 27.5, 27),
    "int8": (30, 36, 29),
    "ternary": (5, 5, 30),  # of a normal matrix three values keep 1 - 0.26 of the power; gradients of weights read no w
    "binary": (4, 4, 30),  # 1 - 2 / pi of the power is lost: 4.4 dB
}


def model_of(recipe, seed=0, residual_init="zero"):
    return Transformer(replace(SHAPE, recipe=recipe), torch.Generator().manual_seed(seed), residual_init)


def batches(count):
    """Sequences that count upwards by 1, 2 or 3, which is their label; a fifth of the tokens masked."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        labels, starts = rng.integers(0, 3, 16), rng.integers(0, 30, 16)
        texts = [(start + (label + 1) * np.arange(24)) % 30 + 5 for start, label in zip(starts, labels, strict=True)]
        targets = [np.where(rng.random(24) < 0.2, text, IGNORE) for text in texts]
        inputs = [np.where(target != IGNORE, 4, text) for text, target in zip(texts, targets, strict=True)]
        yield pack(inputs, targets, list(labels))


def test_names_are_those_of_the_configuration():
    assert tuple(RECIPES) == config.RECIPES


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_output_and_every_gradient_are_as_near_to_fp32_as_stated(recipe, shape):
    found = of_recipe(recipe, *operands(*shape))
    assert list(found) == ["output", "input gradient", "weight gradient"]
    assert all(db >= floor for db, floor in zip(found.values(), FLOORS[recipe], strict=True)), found


def test_finer_scales_save_what_outliers_cost():
    """A row 10^6 times as large as the others: one scale for all flushes them, one a row does not."""
    x, w, _ = operands(64, 96, 80)
    x[5] *= 1e6
    outputs = {name: Products.apply(x, w, RECIPES[name], None, Counter()) for name in ("fp8-tensorwise", "fp8-rowwise")}
    others = torch.arange(64) != 5
    tensorwise, rowwise = (sqnr_db((x @ w.T)[others], out[others]) for out in outputs.values())
    assert tensorwise < 10
    assert rowwise > 28


def operands_read(recipe, x, w, g, noise):
    """What each of the three products of a recipe reads, written down a second time: pairs of float32 matrices."""

    def q(form, block, power_of_two=False):
        return lambda t, noise=None: Cast(form, block, power_of_two)(t, noise).dequantised()

    a, b, c = {
        "fp8-tensorwise": (q(E4M3, TENSOR), q(E4M3, TENSOR), q(E5M2, TENSOR)),
        "fp8-delayed": (q(E4M3, TENSOR), q(E4M3, TENSOR), q(E5M2, TENSOR)),
        "fp8-rowwise": (q(E4M3, ROW), q(E4M3, ROW), q(E5M2, ROW)),
        "fp8-blockwise": (q(E4M3, (1, 128)), q(E4M3, (128, 128)), q(E4M3, (1, 128))),
        "mxfp8": (q(E4M3, (1, 32), True),) * 3,
        "int8": (q(INT8, ROW),) * 3,
        "ternary": (q(INT8, ROW), lambda t: ternary(t).dequantised(), None),
    }[recipe]
    if c is None:  # straight through
        return (a(x), b(w)), (g, b(w).T), (g.T, a(x).T)
    turned = None if noise is None else noise.T
    return (a(x), b(w)), (c(g, noise), b(w.T)), (c(g.T, turned), a(x.T))


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "binary"])
def test_products_read_their_operands_scaled_along_the_sum(recipe):
    x, w, g = operands(70, 150, 130)
    seed = 11 if RECIPES[recipe].stochastic else None
    noise = None if seed is None else uniforms(seed, g.shape)
    leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
    out = Products.apply(*leaves, RECIPES[recipe], seed, Counter())
    found = out, *torch.autograd.grad(out, leaves, g)
    for value, (a, b) in zip(found, operands_read(recipe, x, w, g, noise), strict=True):
        torch.testing.assert_close(value, (a.double() @ (b if b.shape[0] == a.shape[1] else b.T).double()).float())


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_one_scale_for_all_makes_an_output_depend_on_other_rows(recipe):
    x, w, _ = operands(64, 96, 80)
    alone, among = (Products.apply(part, w, RECIPES[recipe], None, Counter())[:8] for part in (x[:8], x))
    assert (sqnr_db(alone, among) > 100) == (recipe not in ("fp8-tensorwise", "fp8-delayed"))


@pytest.mark.parametrize(("recipe", "block"), [("fp8-tensorwise", TENSOR), ("fp8-rowwise", ROW)])
def test_torchs_own_scaled_product_gives_the_same_output(recipe, block):
    x, w, _ = operands(64, 96, 80)
    a, b = Cast(E4M3, block)(x), Cast(E4M3, block)(w)
    scales = (a.scales[0, 0], b.scales[0, 0]) if block == TENSOR else (a.scales, b.scales.T)
    theirs = torch._scaled_mm(a.values, b.values.T, *scales, out_dtype=torch.float32)
    assert sqnr_db(theirs, Products.apply(x, w, RECIPES[recipe], None, Counter())) > 100


def test_torchaos_emulated_float8_training_is_as_near_to_fp32():
    """Its tensorwise recipe is ours; its rowwise one has powers of two for scales, and e4m3 gradients."""
    pytest.importorskip("torchao", reason="torchao is not installed; make test installs it")
    given = operands(*SHAPES[2])
    ours, theirs = of_recipe("fp8-tensorwise", *given), of_torchao("tensorwise", *given)
    assert ours == pytest.approx(theirs, abs=0.01)
    ours, theirs = of_recipe("fp8-rowwise", *given), of_torchao("rowwise", *given)
    assert ours["output"] > theirs["output"]
    assert ours["input gradient"] < theirs["input gradient"] - 3  # a bit of mantissa less, of one of two operands


def test_gradients_rounded_stochastically_are_right_in_the_mean():
    x, w, g = operands(32, 48, 40)
    w, recipe = w.requires_grad_(), RECIPES["int8"]
    to_x = x.requires_grad_()
    draws = [torch.autograd.grad(Products.apply(to_x, w, recipe, seed, Counter()), (to_x, w), g) for seed in range(200)]
    q = recipe.weight(w.detach().T).dequantised()
    means = [torch.stack(each).mean(0) for each in zip(*draws, strict=True)]
    exact = g @ q.T, g.T @ recipe.inputs(x.detach().T).dequantised().T
    for one, mean, right in zip(draws[0], means, exact, strict=True):
        assert sqnr_db(right, mean) > sqnr_db(right, one) + 15  # 200 draws: 23 dB, were there no bias


def test_the_same_seed_draws_the_same_gradients_and_checkpointing_too():
    batch = next(iter(batches(1)))

    def gradients(checkpointing, seed=0):
        losses = Losses(model_of("int8", residual_init="scaled"))
        losses.model.model.checkpointing = checkpointing
        torch.manual_seed(seed)
        sum(losses(batch, True, True)).backward()
        return torch.cat([p.grad.flatten() for p in losses.parameters()])

    plain = gradients(False)
    assert torch.equal(plain, gradients(False))
    assert torch.equal(plain, gradients(True))
    assert not torch.equal(plain, gradients(False, seed=1))


# --- converting -----------------------------------------------------------------------------------------------------


def test_convert_lists_what_it_converts_and_what_it_leaves():
    plain = model_of(None)
    parameters = dict(plain.named_parameters())
    done = lowbit.convert(plain, "mxfp8")
    assert set(done.converted) == {
        f"model.layers.{i}.{name}" for i in range(2) for name in ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo")
    }
    assert all(isinstance(plain.get_submodule(name), Linear) for name in done.converted)
    assert done.left["head.dense"] == done.left["mlm_head.dense"] == "a head"
    assert done.left["classifier"] == "a side below 32"
    assert done.left["model.embeddings.tok_embeddings"] == done.left["model.final_norm"] == "no nn.Linear"
    owners = {name.rpartition(".")[0] for name in parameters}
    assert owners == {*done.converted, *done.left}
    assert str(done).startswith("mxfp8: 8 matrices converted; ")
    after = dict(plain.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameters[name] for name in after)  # optimizers and checkpoints see no difference
    groups = parameter_groups(plain, "muon", 0.01), parameter_groups(model_of(None), "muon", 0.01)
    assert [len(g["params"]) for g in groups[0]] == [len(g["params"]) for g in groups[1]]


def test_the_filter_and_shapes_decide_and_a_bias_stays():
    model = nn.Sequential(nn.Linear(40, 64), nn.Linear(64, 16), nn.Linear(64, 64, dtype=torch.float64)).eval()
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    exact = model[0](x)
    done = lowbit.convert(model, "fp8-rowwise", leave=lambda name, linear: None)
    assert done.converted == ("0",)
    assert done.left == {"1": "a side below 32", "2": "not in float32"}
    assert not model[0].training
    assert model[0](x).shape == (3, 5, 64)
    assert sqnr_db(exact, model[0](x)) > 25
    model[0].bias.data += 100
    assert (model[0](x).mean() - exact.mean() - 100).abs() < 0.1


def test_refused_where_nothing_would_change():
    with pytest.raises(InputError, match="precision=int8: no matrix .*set precision=fp32"):
        lowbit.convert(nn.Sequential(nn.Linear(8, 8)), "int8", leave=lambda *_: None)
    with pytest.raises(InputError, match="precision=fp9: no such recipe; use one of fp8-tensorwise"):
        lowbit.convert(nn.Sequential(nn.Linear(64, 64)), "fp9")


def test_odd_inputs_are_counted_and_as_loud_as_in_fp32():
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    lowbit.convert(model, "fp8-rowwise", leave=lambda *_: None)
    x = torch.ones(6, 64)
    x[1], x[2, 0], x[3, :2] = 0, torch.inf, torch.nan
    out = model(x.requires_grad_())
    assert out.isfinite().all(1).tolist() == [True, True, False, False, True, True]
    out[0].sum().backward()  # all other rows of the output's gradient are zero
    found = {"input zero blocks": 1, "input infinite": 1, "input NaN": 2, "gradient zero blocks": 5}
    assert lowbit.take_odd(model) == found
    assert not lowbit.take_odd(model)


# --- training -------------------------------------------------------------------------------------------------------


def trained(recipe, steps=60, matrix_lr=1e-2):
    """Mean loss of the last 20 of `steps` steps."""
    model = Losses(model_of(recipe))
    optimizer, losses = build_optimizer(model, "muon", 0.01), []
    for step, batch in enumerate(batches(steps)):
        torch.manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = (matrix_lr if group["muon"] else 3e-3) * (1 - step / steps)
        mlm, task = model(batch, True, True)
        loss = mlm / len(batch.masked) + task / len(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.mean(losses[-20:])


@pytest.fixture(scope="module")
def plain_loss():
    return trained(None)


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_stays_near_fp32(recipe, plain_loss):
    """8 bits: within 0.25% of the loss; 1 and 2 bits: within 8%."""
    gap = trained(recipe) / plain_loss - 1
    assert abs(gap) < (0.08 if RECIPES[recipe].in_the_weights else 0.0025), gap


def test_layers_that_learn_nothing_are_farther_from_it(plain_loss):
    assert trained(None, matrix_lr=0.0) > 1.1 * plain_loss


def test_a_saved_model_computes_by_its_recipe_and_is_exported_as_its_products_read_it(tmp_path):
    batch = next(iter(batches(1)))
    for recipe in ("ternary", "fp8-rowwise"):
        model = model_of(recipe, residual_init="scaled").eval()
        save_model(model, tmp_path)
        again = load_model(tmp_path)
        assert torch.equal(again(batch), model(batch))
        plain = Transformer(SHAPE, generator=None).eval()
        plain.load_state_dict(lowbit.weights_as_read(model))
        exported = sqnr_db(plain(batch), model(batch))  # without the rounding of the inputs
        plain.load_state_dict(model.state_dict())
        unrounded = sqnr_db(plain(batch), model(batch))
        assert exported > 25
        assert (exported > unrounded + 10) == (recipe == "ternary")
    matrix = lowbit.weights_as_read(model_of("ternary"))["model.layers.0.attn.Wqkv.weight"]
    assert len(matrix.unique()) == 3


# --- runs -----------------------------------------------------------------------------------------------------------

RUN = [
    "model.hidden=32", "model.layers=2", "model.heads=2", "model.intermediate=48", "model.max_length=32",
    "tokenizer.vocabulary=400", "joint.steps=8", "joint.batch=8", "joint.eval_every=4", "init=random",
    "finetune.steps=4", "finetune.batch=8", "finetune.eval_every=2", "threads=1", "checkpoint_seconds=0",
]  # fmt: skip
KILLED = """
import os, signal, sys
from tlm import engine
from tlm.cli import main
set_rates, calls = engine.set_rates, []
def killing(*arguments):
    calls.append(1)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    set_rates(*arguments)
engine.set_rates = killing
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def arguments(tiny_task, tmp_path):
    return ["train", f"task={tiny_task}", f"out={tmp_path}", f"cache={tmp_path / 'cache'}", *RUN]


@pytest.mark.parametrize("recipe", ["int8", "fp8-delayed"])
def test_a_killed_run_goes_on_to_the_same_end_to_the_bit(recipe, arguments, tmp_path, capsys):
    """By the recipes that draw random numbers, and remember; to the same test scores by the saved model."""
    arguments.append(f"precision={recipe}")
    assert main([*arguments, "run=whole"]) == 0
    assert f"{recipe}: 8 matrices converted; " in capsys.readouterr().err
    command = [sys.executable, "-c", KILLED, *arguments, "run=killed"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, capture_output=True, env=environment, timeout=600).returncode == -signal.SIGKILL
    assert main([*arguments, "run=killed"]) == 0
    whole, killed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["test"] == json.loads((tmp_path / "killed" / "summary.json").read_text())["test"]
    assert load_model(tmp_path / "killed" / "model").shape.recipe == recipe
    assert len(summary["model"]["lowbit"]["converted"]) == 8


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["compile=true"], "compile=true: does not go with precision=mxfp8; set compile=false"),
        (["model.hidden=16"], "precision=mxfp8: no matrix of the layers"),
        (["precision=mxfp7"], "precision=mxfp7: not a valid choice; did you mean mxfp8?"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(given, said, arguments, tmp_path, capsys):
    assert main([*arguments, "precision=mxfp8", "run=refused", *given]) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("precision", "capability", "triton", "said"),
    [
        ("fp8-rowwise", (9, 0), True, None),
        ("bf16", (8, 0), False, None),
        ("mxfp8", (10, 0), True, "has no GPU kernels; set device=cpu, or precision= to one of fp8-tensorwise, "),
        ("fp8-blockwise", (8, 0), True, r"this GPU \(sm_80\) does not multiply e4m3"),
        ("fp8-tensorwise", (9, 0), False, "its GPU kernels need triton"),
    ],
)
def test_what_a_gpu_lacks_is_one_sentence(precision, capability, triton, said, monkeypatch):
    settings = replace(config.TrainConfig(), precision=precision)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: triton or None)
    expected = pytest.raises(InputError, match=f"precision={precision}: {said}") if said else nullcontext()
    with expected:
        lowbit.check(settings, torch.device("cuda"))


def test_plain_products_are_those_of_torch():
    """The measure itself: an error of a hundredth is 40 dB."""
    x, w, _ = operands(16, 32, 32)
    exact = F.linear(x, w)
    assert sqnr_db(exact, exact * 1.01) == pytest.approx(40, abs=1e-3)
