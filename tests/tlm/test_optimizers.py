import math

import numpy as np
import pytest
import torch
from torch import nn

from tlm.model import ModelShape, Transformer
from tlm.optimizers import Muon, muon_flops, orthogonalise, parameter_groups, schedule


def run(optimizer, parameters, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def copies(*shapes):
    generator = torch.Generator().manual_seed(9)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def test_adamw_is_torchs_over_50_steps():
    ours, theirs = copies((5, 3), (7,)), copies((5, 3), (7,))
    run(Muon([dict(params=ours, lr=0.01, weight_decay=0.1)], betas=(0.9, 0.98)), ours, 50)
    run(torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-8), theirs, 50)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(8, 8), (12, 6), (6, 12)])
def test_muon_is_the_formula_over_50_steps(shape):
    """Against numpy in float64: momentum, Nesterov, the quintic iteration, the scale, decoupled decay."""
    (ours,) = copies(shape)
    w, buffer = ours.detach().double().numpy().copy(), np.zeros(shape)
    generator = torch.Generator().manual_seed(0)
    optimizer = Muon([dict(params=[ours], lr=0.02, weight_decay=0.1, muon=True)])
    for _ in range(50):
        gradient = torch.randn(shape, generator=generator)
        ours.grad = gradient.clone()
        optimizer.step()
        g = gradient.double().numpy()
        buffer = 0.95 * buffer + 0.05 * g
        direction = 0.05 * g + 0.95 * buffer
        x = direction / np.linalg.norm(direction)
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
        w = w * (1 - 0.02 * 0.1) - 0.02 * max(1, shape[0] / shape[1]) ** 0.5 * x
    np.testing.assert_allclose(ours.detach().numpy(), w, rtol=2e-3, atol=2e-4)


def test_orthogonalise_brings_singular_values_near_one():
    """Jordan et al.: five steps bring singular values into about [0.7, 1.2], and keep the singular vectors."""
    matrix = torch.randn(4, 20, 12, generator=torch.Generator().manual_seed(0))
    out = orthogonalise(matrix)
    assert torch.linalg.svdvals(out).min() > 0.6
    assert torch.linalg.svdvals(out).max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(out.flatten(1), (u @ v).flatten(1)).min() > 0.97


def test_matrices_that_are_several_in_one_are_orthogonalised_each_by_itself():
    (fused,), parts = copies((12, 6)), None
    parts = [nn.Parameter(p.clone()) for p in fused.detach().chunk(3)]
    together = Muon([dict(params=[fused], lr=0.1, muon=True, pieces=3)])
    apart = Muon([dict(params=parts, lr=0.1, muon=True)])
    gradient = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    fused.grad = gradient
    for part, piece in zip(parts, gradient.chunk(3), strict=True):
        part.grad = piece
    together.step()
    apart.step()
    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in parts]))


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_every_parameter_is_in_one_group_and_decay_is_for_matrices(kind):
    model = Transformer(ModelShape(50, 16, 2, 2, 24, 16, 3), torch.Generator().manual_seed(0))
    groups = parameter_groups(model, kind, 0.1)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in decayed) == (p.ndim == 2 and "tok_embeddings" not in name), name
    assert any(group["rate"] == "matrix_lr" for group in groups) == (kind == "muon")


def test_muon_flops_are_those_of_its_products():
    from torch.utils.flop_counter import FlopCounterMode

    model = Transformer(ModelShape(50, 16, 3, 2, 24, 16, 3), torch.Generator().manual_seed(0))
    groups = [dict(g, lr=0.1) for g in parameter_groups(model, "muon", 0.0) if g.get("muon")]
    for group in groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    with FlopCounterMode(display=False) as counter:
        Muon(groups).step()
    assert muon_flops(16, 24, 3) == counter.get_total_flops()


def test_schedules_by_hand():
    share = [schedule("linear", step, 10, 0.2) for step in range(10)]
    assert share == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert schedule("cosine", 6, 10, 0.2) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)))
    assert [schedule("trapezoid", step, 100, 0) for step in (10, 39, 70)] == pytest.approx([1, 1, 0.5])
    assert schedule("constant", 99, 100, 0.1) == 1.0
