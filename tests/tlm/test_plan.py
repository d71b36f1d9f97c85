from pathlib import Path

import pytest

from tlm.config import TrainConfig, load, validate
from tlm.plan import plan

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.stem)
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


def test_a_batch_ramp_costs_the_area_under_it(tiny_task):
    """From 1/4 to 1 over half of the steps: 5/8 of that half is seen, 13/16 of all."""
    plain, ramped = (
        plan(validate(load(TrainConfig, [f"task={tiny_task}", "optimizer=adamw", f"finetune.batch_ramp={ramp}"])))
        for ramp in (0, 0.5)
    )
    for what in ("tokens", "flops"):
        assert ramped[what]["finetune"] == pytest.approx(13 / 16 * plain[what]["finetune"], rel=1e-3)
        assert ramped[what]["joint"] == plain[what]["joint"]
