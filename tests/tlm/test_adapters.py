"""A frozen base of few bits and its adapters: the numbers by hand, what trains, whole runs, and what is refused."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_lowbit import KILLED, batches

from tlm import lowbit
from tlm.cli import main
from tlm.lowbit.adapters import ALPHA, Adapted, adapters, merge
from tlm.model import ModelShape, Transformer, load_model, save_model
from tlm.objectives import Losses
from tlm.optimizers import build_optimizer

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; make test installs it")

SHAPE = ModelShape(300, 64, 2, 2, 96, 32, 3)
# Dettmers et al. 2023, appendix E: quantiles of the normal distribution, a zero among them.
NF4 = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
       0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0]  # fmt: skip
FP4 = [sign * x / 12 for x in (0, 0.0625, 2, 3, 4, 6, 8, 12) for sign in (1, -1)]


def by_hand(base, w):
    """float32 [O, K]: the nearest of the numbers that a block of 64, or a row, can hold."""
    if base == "int8-weight":
        largest = w.abs().amax(1, keepdim=True)
        return (w / largest * 127).round() * largest / 127
    levels = torch.tensor(NF4 if base == "nf4" else FP4)
    blocks = w.reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / largest)[..., None] - levels).abs().argmin(-1)
    return (levels[nearest] * largest).view_as(w)


def plain_model(seed=0):
    return Transformer(SHAPE, torch.Generator().manual_seed(seed), "scaled")


def adapted_model(base, rank=4, trained=True):
    """With adapters that are no longer zero, if `trained`."""
    model = plain_model()
    lowbit.adapt(model, base, rank, torch.Generator().manual_seed(1))
    for module in adapters(model).values():
        if rank and trained:
            torch.nn.init.normal_(module.lora_B.weight, std=0.05, generator=torch.Generator().manual_seed(2))
    return model


@pytest.mark.parametrize("base", ["nf4", "fp4", "int8-weight"])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (70, 160)])
def test_frozen_numbers_are_the_nearest_of_their_kind(base, shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    module = Adapted(shape[1], shape[0], base, rank=0)
    module.freeze(w)
    exact, found = by_hand(base, w), module.dequantised()
    # Halfway between two levels, or, for int8, after another order of roundings, the other one may be taken.
    assert ((found - exact).abs() < 1e-5).float().mean() > 0.999
    assert (found - w).abs().max() <= (exact - w).abs().max() + 1e-3
    bits = 8 * (module.weight.nbytes + module.scales.nbytes) / w.numel()
    assert bits == pytest.approx(8 + 32 / shape[1] if base == "int8-weight" else 4.5)


@pytest.mark.parametrize("base", ["nf4", "int8-weight"])
def test_outputs_and_gradients_are_those_of_the_base_and_the_adapters_by_hand(base):
    generator = torch.Generator().manual_seed(4)
    w, x, g = (torch.randn(shape, generator=generator) for shape in ((96, 64), (2, 5, 64), (2, 5, 96)))
    module = Adapted(64, 96, base, rank=4)
    module.freeze(w, generator)
    assert torch.equal(module(x), x @ module.dequantised().T)  # B is zero
    torch.nn.init.normal_(module.lora_B.weight, generator=generator)
    a, b = (lora.weight.detach().clone().requires_grad_() for lora in (module.lora_A, module.lora_B))
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    exact = other @ module.dequantised().T + 4 * (other @ a.T @ b.T)
    assert ALPHA / 4 == 4
    found = module(leaf)
    torch.testing.assert_close(found, exact)
    theirs = torch.autograd.grad(exact, (other, a, b), g)
    ours = torch.autograd.grad(found, (leaf, module.lora_A.weight, module.lora_B.weight), g)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x @ module.merged().T, exact.detach(), rtol=1e-4, atol=1e-4)


def test_only_adapters_and_heads_get_gradients_and_train():
    model = adapted_model("nf4")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    losses, batch = Losses(model), next(iter(batches(1)))
    sum(losses(batch, True, True)).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    heads = {name for name, _ in model.named_parameters() if not name.startswith("model.")}
    assert with_gradient == heads | {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert len(with_gradient) == len(heads) + 2 * 8
    optimizer = build_optimizer(model, "muon", 0.01)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == with_gradient


def test_it_begins_as_the_rounded_model_and_a_merged_one_answers_alike(tmp_path):
    batch = next(iter(batches(1)))
    begun, rounded, model = (
        adapted_model("nf4", trained=False).eval(), adapted_model("nf4", rank=0).eval(), adapted_model("nf4").eval()
    )  # fmt: skip
    assert torch.equal(begun(batch), rounded(batch))
    assert not torch.allclose(model(batch), rounded(batch), atol=1e-2)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert torch.equal(again(batch), model(batch))
    of_adapters = 2 * 4 * (8 * 64 + 3 * 96)
    assert lowbit.num_parameters(model) == lowbit.num_parameters(plain_model()) + of_adapters
    assert merge(again) == "8 matrices of nf4 with adapters of rank 4 merged into fp32"
    assert again.shape == SHAPE
    torch.testing.assert_close(again(batch), model(batch), rtol=1e-4, atol=1e-4)
    assert again.state_dict().keys() == plain_model().state_dict().keys()
    assert merge(again) == ""


def test_flops_are_those_that_torch_counts():
    """But for the first layer: its inputs, the frozen embeddings, want no gradient."""
    from torch.utils.flop_counter import FlopCounterMode

    from tlm.model import training_flops

    model = adapted_model("nf4")
    batch = next(iter(batches(1)))
    with FlopCounterMode(display=False) as counter:
        sum(Losses(model)(batch, True, True)).backward()
    shape, tokens = replace(SHAPE, rank=4), sum(batch.lengths)
    counted = training_flops(shape, batch.lengths, len(batch.masked), len(batch))
    first = 2 * tokens * (3 * 64 * 64 + 4 * 64)
    assert counter.get_total_flops() == counted - first


# --- runs -----------------------------------------------------------------------------------------------------------

RUN = [
    "model.hidden=64", "model.layers=2", "model.heads=2", "model.intermediate=96", "model.max_length=32",
    "tokenizer.vocabulary=400", "joint.steps=8", "joint.batch=8", "joint.eval_every=4", "init=random",
    "finetune.steps=4", "finetune.batch=8", "finetune.eval_every=2", "threads=1", "checkpoint_seconds=0", "boards=[]",
]  # fmt: skip


@pytest.fixture(scope="module")
def start(tiny_task, tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("start")
    assert main(["train", f"task={tiny_task}", f"out={out}", f"cache={out}/cache", *RUN, "run=plain"]) == 0
    return out / "plain"


@pytest.fixture
def arguments(tiny_task, tmp_path, start):
    names = [f"task={tiny_task}", f"out={tmp_path}", f"cache={tmp_path / 'cache'}"]
    return ["train", *names, *RUN, f"init_from={start}/model", "precision=nf4", "rank=4"]


def test_a_killed_run_goes_on_to_the_same_end_to_the_bit(arguments, start, tmp_path, capsys):
    assert main([*arguments, "run=whole", "joint.average=ema"]) == 0
    assert "nf4: 8 matrices converted; " in capsys.readouterr().err
    command = [sys.executable, "-c", KILLED, *arguments, "run=killed", "joint.average=ema"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, capture_output=True, env=environment, timeout=600).returncode == -signal.SIGKILL
    assert main([*arguments, "run=killed", "joint.average=ema"]) == 0
    whole, killed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole.keys() | killed.keys())
    assert whole["model.layers.0.attn.Wqkv.weight"].dtype == torch.uint8
    embeddings = "model.embeddings.tok_embeddings.weight"
    assert torch.equal(whole[embeddings], load_file(start / "model" / "model.safetensors")[embeddings])
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    of_plain = json.loads((start / "summary.json").read_text())
    assert summary["model"]["trained_parameters"] < summary["model"]["parameters"] / 2
    assert summary["model"]["parameters"] == of_plain["model"]["parameters"] + 4 * 2 * (8 * 64 + 3 * 96)
    assert summary["init_from"]["cost"]["flops"] == of_plain["cost"]["flops"]


def test_it_is_asked_scored_exported_and_started_from(arguments, tiny_task, tmp_path, capsys):
    assert main([*arguments, "run=nf4"]) == 0
    run = tmp_path / "nf4"
    test = json.loads((run / "summary.json").read_text())["test"]
    capsys.readouterr()
    assert main(["eval", str(run), "split=test", "threads=1"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(test["loss"], abs=1e-6)
    for quant, said in ((None, "8 matrices of nf4 with adapters of rank 4 merged into fp32"), ("packed", "merged")):
        more = [f"quant={quant}"] if quant else []
        assert main(["export", str(run), f"out={tmp_path / str(quant)}", *more]) == 0
        assert said in capsys.readouterr().out
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "None")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "None")
    lines = (tiny_task / "test.jsonl").read_text().splitlines()[:10]
    texts = [json.loads(line)["text"] for line in lines]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    with torch.no_grad():
        shares = theirs(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt")).logits.softmax(-1)

    def predicted(folder, *keys):
        assert main(["predict", str(folder), str(tmp_path / "texts.jsonl"), "threads=1", *keys]) == 0
        answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return torch.tensor([list(answer["probabilities"].values()) for answer in answers])

    torch.testing.assert_close(predicted(run), shares, rtol=0, atol=1e-4)
    assert torch.equal(predicted(run, "precision=int8"), predicted(tmp_path / "packed"))
    assert 0 < (predicted(run, "precision=fp4") - shares).abs().max() < 0.3
    again = [argument for argument in arguments if not argument.startswith(("init_from=", "precision="))]
    assert main([*again, "run=again", f"init_from={run}/model"]) == 0
    assert load_model(tmp_path / "again" / "model").shape.recipe is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["init_from="], "precision=nf4: freezes the encoder, which from a random start would stay random; "),
        (["init_from=hf:there"], "precision=nf4: does not go with init_from=hf:FOLDER; leave it out"),
        (["compile=true"], "compile=true: does not go with precision=nf4; set compile=false"),
        (["rank=0"], "rank=0: must be at least 1"),
        (["model.hidden=32", "model.heads=1"], "is of another shape"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(given, said, arguments, tmp_path, capsys):
    assert main([*arguments, "run=refused", *given]) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "refused").exists()


def test_without_bitsandbytes_it_is_one_sentence(arguments, tmp_path, monkeypatch, capsys):
    lowbit.adapters.bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert main([*arguments, "run=refused"]) == 2
    assert "bitsandbytes is missing, whose numbers these are; pip install" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_pieces_of_zero_3_train_alike(arguments, tmp_path):
    """Between the stages a model is put together anew: what was frozen stays so."""
    for stage in (0, 3):
        more = ["optimizer=adamw", f"deepspeed.zero_optimization.stage={stage}", f"run=zero-{stage}"]
        assert main([*arguments, *more]) == 0
    plain, pieces = (load_file(tmp_path / f"zero-{stage}" / "model" / "model.safetensors") for stage in (0, 3))
    assert all(torch.equal(plain[name], pieces[name]) for name in plain if plain[name].dtype == torch.uint8)
    for name in plain:
        torch.testing.assert_close(pieces[name], plain[name], rtol=1e-3, atol=1e-5)
