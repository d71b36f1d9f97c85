from pathlib import Path

import pytest
import torch

from tlm.config import TrainConfig, load, validate
from tlm.memory import activation_bytes, optimizer_bytes
from tlm.plan import plan

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    "path", sorted({*CONFIGS.glob("*.yaml"), *CONFIGS.glob("reference/*.yaml")}), ids=lambda p: p.stem
)
def test_each_configuration_in_configs_is_valid(path):
    validate(load(TrainConfig, [str(path)]))


def test_the_papers_preset_plans_the_papers_cost(tiny_task, tiny_corpus):
    """109M parameters; 6 x 109M x 150,000 x 256 x 128 FLOPs for SciERC."""
    arguments = [str(CONFIGS / "paper-small.yaml"), f"task={tiny_task}", f"corpus={tiny_corpus}"]
    planned = plan(validate(load(TrainConfig, arguments)))
    assert planned["model"]["parameters"] == pytest.approx(109e6, rel=0.01)
    assert planned["flops"]["paper"] == pytest.approx(6 * 109e6 * 150_000 * 256 * 128, rel=0.01)


def test_the_plan_counts_the_parameters_that_the_model_has(tiny_task):
    import torch

    from tlm.model import ModelShape, Transformer

    config = validate(load(TrainConfig, [f"task={tiny_task}", "tokenizer.vocabulary=500"]))
    shape = ModelShape(500, 128, 4, 4, 256, 128, 3)
    real = sum(p.numel() for p in Transformer(shape, torch.Generator().manual_seed(0)).parameters())
    assert plan(config)["model"]["parameters"] == pytest.approx(real, rel=0.005)


def test_what_is_left_open_suits_the_task(tmp_path, tiny_corpus):
    """19 of 20 texts have at most 200 words, 1.4 x 200 + 2 tokens: 282, in whole 64s 320; one has 1,000."""
    rows = [
        "text,label",
        *(f"{'word ' * 199}{n},{n % 2}" for n in range(190)),
        *(f"{'word ' * 999}{n},0" for n in range(5)),
    ]
    path = tmp_path / "task.csv"
    path.write_text("\n".join(rows))
    given = [f"task={path}", f"corpus={tiny_corpus}", "joint.steps=1000", "joint.batch_tokens=640", "joint.batch=2"]
    chosen = plan(validate(load(TrainConfig, given)))["left_open"]
    assert chosen["model.max_length"] == 320
    # 1,000 micro-batches of 2 texts would read the 157 thirteen times: of three, one is the task's, for about four
    assert chosen["joint.external_per_task"] == 2
    assert chosen["joint.balance"] == chosen["finetune.balance"] == 0.5  # the metric is macro-F1
    of_all = {"model.max_length", "retrieval.max_words", "joint.external_per_task"}
    assert set(chosen) == of_all | {"joint.balance", "finetune.balance"}
    # of 1,000 micro-batches 667 are external, of 2 x 320 tokens at most
    assert 500 * 2 * 320 / 1.4 < chosen["retrieval.max_words"] <= 667 * 2 * 320 / 1.4
    fixed = [*given, "joint.external_per_task=1", "joint.balance=0", "finetune.balance=0"]
    fixed += ["model.max_length=128", "retrieval.max_words=5"]
    assert "left_open" not in plan(validate(load(TrainConfig, fixed)))


def test_a_batch_ramp_costs_the_area_under_it(tiny_task):
    """From 1/4 to 1 over half of the steps: 5/8 of that half is seen, 13/16 of all."""
    plain, ramped = (
        plan(validate(load(TrainConfig, [f"task={tiny_task}", "optimizer=adamw", f"finetune.batch_ramp={ramp}"])))
        for ramp in (0, 0.5)
    )
    for what in ("tokens", "flops"):
        assert ramped[what]["finetune"] == pytest.approx(13 / 16 * plain[what]["finetune"], rel=1e-3)
        assert ramped[what]["joint"] == plain[what]["joint"]


@pytest.mark.parametrize(("length", "mask_rate"), [(64, 0.0), (64, 0.15), (300, 0.15)])
def test_the_plan_counts_the_activations_that_a_step_keeps(length, mask_rate):
    import numpy as np
    import torch

    from tlm.batches import IGNORE, pack
    from tlm.model import ModelShape, Transformer
    from tlm.objectives import Losses

    shape, rng = ModelShape(3000, 128, 4, 4, 256, length, 3), np.random.default_rng(0)
    losses = Losses(Transformer(shape, torch.Generator().manual_seed(0)))
    texts = [rng.integers(5, 3000, length) for _ in range(16)]
    targets = [np.where(rng.random(length) < mask_rate, text, IGNORE) for text in texts]
    batch = pack(texts, targets, [0] * 16)
    weights = {p.untyped_storage().data_ptr() for p in losses.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # the tensor, so that its memory is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses(batch, mask_rate > 0, True)
    expected = activation_bytes(shape, sum(batch.lengths), length, len(batch.masked))
    assert sum(size for size, _ in kept.values()) == pytest.approx(expected, rel=0.03)


def test_the_plan_counts_the_optimizers_state():
    import torch

    from tlm.model import ModelShape, Transformer
    from tlm.optimizers import build_optimizer

    model = Transformer(ModelShape(500, 128, 4, 4, 256, 128, 3), torch.Generator().manual_seed(0))
    total = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2)
    for kind in ("muon", "adamw"):
        optimizer = build_optimizer(model, kind, 0.01)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        real = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
        assert optimizer_bytes(kind, total, matrices) == pytest.approx(real, rel=0.001)


def test_time_on_a_gpu_follows_from_its_own_products(tiny_task, monkeypatch):
    """One whose products of 8,192 take 2 ms in fp32 and 1 ms in bf16: 550 and 1,100 TFLOP/s, half of them used."""
    asked = []

    def seconds(dtype, device, size, _):
        asked.append((device, size))
        return {"torch.float32": 2e-3, "torch.bfloat16": 1e-3}[str(dtype)]

    monkeypatch.setattr("tlm.plan.device_of", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr("tlm.doctor.matmul_seconds", seconds)
    for precision, time in (("fp32", 2e-3), ("bf16", 1e-3)):
        given = [f"task={tiny_task}", "joint.steps=100000000", f"precision={precision}"]
        planned = plan(validate(load(TrainConfig, given)))
        minutes = planned["flops"]["joint"] / (0.5 * 2 * 8192**3 / time) / 60
        assert minutes > 1
        assert planned["estimated_minutes"]["joint"] == pytest.approx(minutes, abs=0.05)
        assert planned["device"].startswith("cuda:0, 5" if precision == "fp32" else "cuda:0, 1,099,")
    assert asked == [("cuda:0", 8192)] * 2


def test_the_plan_names_memory_and_money(tiny_task):
    planned = plan(validate(load(TrainConfig, [f"task={tiny_task}", "price_per_hour=6", "joint.steps=100000"])))
    *parts, whole = planned["estimated_peak_memory_mib"].values()
    assert whole == pytest.approx(sum(parts), abs=3)
    minutes = sum(planned["estimated_minutes"].values())
    assert minutes > 0
    assert planned["estimated_money"] == pytest.approx(minutes / 10, abs=0.01)
