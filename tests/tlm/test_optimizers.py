import io
import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.nn.functional import pad

from tasks.errors import InputError
from tlm import engine as engines
from tlm.batches import pack
from tlm.config import StageConfig
from tlm.model import ModelShape, Transformer
from tlm.objectives import Losses
from tlm.optimizers import (
    BETAS,
    NEWTON_SCHULZ,
    AdamW8bit,
    Muon,
    bitsandbytes_adamw8bit,
    build_optimizer,
    by_gram,
    by_matrix,
    muon_flops,
    orthogonalise,
    parameter_groups,
    schedule,
)

OPTIMIZERS = ["muon", "adamw", "adamw8bit"]


def run(optimizer, parameters, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def copies(*shapes):
    generator = torch.Generator().manual_seed(9)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def distance(ours, theirs, start):
    """How far apart two runs ended, as a share of how far they went."""
    ours, theirs, start = (torch.cat([p.detach().flatten() for p in x]) for x in (ours, theirs, start))
    return ((ours - theirs).norm() / (theirs - start).norm()).item()


def model(vocabulary=300, hidden=64):
    return Transformer(ModelShape(vocabulary, hidden, 2, 2, 96, 16, 3), torch.Generator().manual_seed(0))


def built(kind, weight_decay=0.1, lr=0.01):
    """A model, its parameters and its optimizer, ready to step."""
    net = model()
    optimizer = build_optimizer(net, kind, weight_decay)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return net, list(net.parameters()), optimizer


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


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_muon_on_pieces_is_muon_on_matrices(processes, monkeypatch):
    """As ZeRO 1 and 2 cut: all matrices end to end, padded, in pieces of one length, also in the middle of matrices.

    Each process keeps the momentum of its piece alone.
    """
    shape, of_group = (12, 6), dict(lr=0.02, weight_decay=0.1, muon=True, parts=3, rows=2, shape=(12, 6))
    matrices = copies(*[shape] * 5)
    flat = torch.cat([p.detach().flatten() for p in matrices])
    padding = -len(flat) % (2 * processes)
    pieces = [nn.Parameter(piece.clone()) for piece in pad(flat, (0, padding)).chunk(processes)]
    whole = Muon([dict(params=matrices, **of_group)])
    cut_up = [Muon([dict(params=[piece], **of_group)]) for piece in pieces]
    meet, generator = threading.Barrier(processes), torch.Generator().manual_seed(0)
    ranks, shown = threading.local(), [None] * processes

    def all_gather(found, mine):
        shown[ranks.rank] = mine
        meet.wait()
        for place, theirs in zip(found, shown, strict=True):
            place.copy_(theirs)
        meet.wait()

    monkeypatch.setattr(distributed, "all_gather", all_gather)
    monkeypatch.setattr(distributed, "get_rank", lambda: ranks.rank)
    monkeypatch.setattr(distributed, "get_world_size", lambda: processes)
    monkeypatch.setattr(distributed, "get_backend", lambda: "gloo")

    def step(rank):
        ranks.rank = rank
        cut_up[rank].step()

    for _ in range(5):
        for p in matrices:
            p.grad = torch.randn(shape, generator=generator)
        gradients = pad(torch.cat([p.grad.flatten() for p in matrices]), (0, padding)).chunk(processes)
        for piece, gradient in zip(pieces, gradients, strict=True):
            piece.grad = gradient.clone()
        whole.step()
        with ThreadPoolExecutor(processes) as pool:
            list(pool.map(step, range(processes)))
    found = torch.cat([piece.detach() for piece in pieces])
    torch.testing.assert_close(found, pad(torch.cat([p.detach().flatten() for p in matrices]), (0, padding)))
    momenta = [optimizer.state[piece]["momentum_buffer"] for optimizer, piece in zip(cut_up, pieces, strict=True)]
    assert [len(m) for m in momenta] == [(len(flat) + padding) // processes] * processes


@pytest.mark.parametrize(("their_precision", "apart"), [("float", 1e-4), ("bfloat16", 0.02)])
@pytest.mark.parametrize("shape", [(8, 8), (12, 6), (6, 12)])
def test_muon_is_torchs_over_50_steps(shape, their_precision, apart, monkeypatch):
    """torch orthogonalises in bfloat16, ours in the matrix's precision: the same once theirs computes in float32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", getattr(torch.Tensor, their_precision))
    ours, theirs, start = copies(shape), copies(shape), copies(shape)
    run(Muon([dict(params=ours, lr=0.02, weight_decay=0.1, muon=True)]), ours, 50)
    run(torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95), theirs, 50)
    assert distance(ours, theirs, start) < apart


def test_adamw8bit_is_near_bitsandbytes_and_torchs_adamw_over_50_steps():
    """bitsandbytes' CPU version does not always choose the nearest level (3% of second moments get another), ours does
    (test_kernels.py); what that leaves between them is small beside what 8 bits leave to 32."""
    net, ours, optimizer = built("adamw8bit")
    theirs, exact, start = (list(model().parameters()) for _ in range(3))
    decayed = {name for name, p in net.named_parameters() if p.ndim == 2 and "tok_embeddings" not in name}
    for kind, parameters in ((bitsandbytes_adamw8bit(), theirs), (torch.optim.AdamW, exact)):
        named = list(zip((name for name, _ in net.named_parameters()), parameters, strict=True))
        groups = [
            dict(params=[p for name, p in named if (name in decayed) == decays], weight_decay=0.1 * decays)
            for decays in (True, False)
        ]
        run(kind(groups, lr=0.01, betas=BETAS), parameters, 50)
    run(optimizer, ours, 50)
    assert distance(ours, theirs, start) < distance(ours, exact, start) / 2
    assert 1e-4 < distance(ours, exact, start) < 0.05


def test_adamw8bit_keeps_moments_in_8_bits():
    """2.03 bytes a parameter: two moments, and two scales of 4 bytes for each 256."""
    _, parameters, optimizer = built("adamw8bit")
    run(optimizer, parameters, 1)
    for p in parameters:
        state = optimizer.state[p]
        kept = sum(t.nbytes for name, t in state.items() if name != "step")
        assert state["exp_avg"].dtype == (torch.uint8 if p.numel() >= 4096 else torch.float32)
        assert kept == (2 * p.numel() + 8 * math.ceil(p.numel() / 256) if p.numel() >= 4096 else 8 * p.numel())


def test_a_missing_bitsandbytes_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(InputError, match=r"pip install 'tlm\[lowbit\]'$"):
        bitsandbytes_adamw8bit()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_saved_optimizer_goes_on_to_the_bit(kind):
    net, parameters, optimizer = built(kind)
    run(optimizer, parameters, 10)
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)

    again, resumed, other = built(kind, lr=0.5)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    for steps, opt in ((parameters, optimizer), (resumed, other)):
        run(opt, steps, 10, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(parameters, resumed, strict=True))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_deepspeed_trains_with_each_optimizer(kind):
    """Through `engines.initialize`: on one batch, over and over, each step lowers the loss."""
    engines.launch()
    net = model()
    stage = StageConfig(weight_decay=0.0, clip=0.0, matrix_lr=1e-3, lr=1e-3)
    engine = engines.initialize(Losses(net), stage, kind, False, {})
    engines.set_rates(engine, stage, 1.0)
    assert isinstance(engine.basic_optimizer, AdamW8bit if kind == "adamw8bit" else Muon)
    batch = pack([np.arange(2, 14), np.arange(5, 20)], labels=np.array([0, 2]))
    losses = []
    for _ in range(5):
        _, loss = engine(batch, False, True)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    engine.destroy()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_rates_by_group(kind):
    """Token embeddings at their share of lr, the layers' matrices at Muon's rate where it has them, the rest at lr."""
    net, stage = model(), StageConfig(lr=0.5, matrix_lr=4.0, embedding_share=0.25)
    optimizer = build_optimizer(net, kind, 0.0)
    engines.set_rates(SimpleNamespace(optimizer=optimizer), stage, 0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in net.named_parameters():
        embeddings, matrix = "tok_embeddings" in name, ".layers." in name and parameter.ndim == 2
        assert rates[id(parameter)] == (0.0625 if embeddings else 2.0 if matrix and kind == "muon" else 0.25), name


def test_orthogonalise_brings_singular_values_near_one():
    """Jordan et al.: five steps bring singular values into about [0.7, 1.2], and keep the singular vectors."""
    matrix = torch.randn(4, 20, 12, generator=torch.Generator().manual_seed(0))
    out = orthogonalise(matrix)
    assert torch.linalg.svdvals(out).min() > 0.6
    assert torch.linalg.svdvals(out).max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(out.flatten(1), (u @ v).flatten(1)).min() > 0.97


@pytest.mark.parametrize("rank", [64, 8])
def test_by_the_gram_matrix_is_by_the_matrix(rank):
    """In float32 on blocks as they come, of full rank and nearly of a low one, as a momentum is: as near to float64."""
    generator = torch.Generator().manual_seed(0)
    left, right, noise = (torch.randn(5, *shape, generator=generator) for shape in ((64, rank), (rank, 256), (64, 256)))
    x = left @ right + 1e-3 * noise
    x = x / x.norm(dim=(1, 2), keepdim=True)
    exact = by_matrix(x.double(), 5)
    torch.testing.assert_close(by_gram(x.double(), 5), exact, rtol=1e-8, atol=1e-10)
    for found in (by_matrix(x, 5), by_gram(x, 5)):
        assert (found - exact).norm() < 3e-4 * exact.norm()


@pytest.mark.parametrize("shape", [(3, 8, 8), (12, 6), (6, 12)])
def test_orthogonalise_is_its_polynomial_of_the_singular_values(shape):
    """By an SVD: five times s <- a s + b s^3 + c s^5, from s over the Frobenius norm."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    for _ in range(5):
        s = sum(c * s**power for c, power in zip(NEWTON_SCHULZ, (1, 3, 5), strict=True))
    torch.testing.assert_close(orthogonalise(matrix), u * s.unsqueeze(-2) @ v, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [dict(), dict(rows=2), dict(columns=3), dict(rows=4, columns=2)])
def test_blocks_are_orthogonalised_each_by_itself(block):
    """Three 4 x 6 matrices on top of each other, cut; against Muon on each block alone, with the matrices' scale."""
    (whole,) = copies((12, 6))
    gradient = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    expected = whole.detach().clone()
    rows, columns = block.get("rows", 4), block.get("columns", 6)
    for i in range(0, 12, rows):
        for j in range(0, 6, columns):
            alone = nn.Parameter(torch.zeros(rows, columns))
            alone.grad = gradient[i : i + rows, j : j + columns]
            Muon([dict(params=[alone], lr=0.1, muon=True)]).step()
            expected[i : i + rows, j : j + columns] += alone.detach() / max(1, rows / columns) ** 0.5
    whole.grad = gradient
    Muon([dict(params=[whole], lr=0.1, muon=True, parts=3, **block)]).step()
    torch.testing.assert_close(whole.detach(), expected)


def test_matrices_are_cut_into_blocks_of_neurons():
    net = Transformer(ModelShape(50, 128, 1, 2, 96, 16, 3), torch.Generator().manual_seed(0))
    cuts = {
        tuple(group["params"][0].shape): (group["parts"], group.get("rows"), group.get("columns"))
        for group in parameter_groups(net, "muon", 0.0)
        if group["muon"]
    }
    qkv, out, up, down = (384, 128), (128, 128), (192, 128), (128, 96)
    assert cuts == {qkv: (3, 64, None), out: (1, None, 64), up: (2, 32, None), down: (1, None, 32)}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_parameter_is_in_one_group_and_follows_its_rate(kind):
    net = model()
    groups = parameter_groups(net, kind, 0.1)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in net.parameters())
    assert any(group["rate"] == "matrix_lr" for group in groups) == (kind == "muon")
    assert all(group["muon"] == (group["rate"] == "matrix_lr") for group in groups)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weight_decay_is_for_matrices_alone(kind):
    """Where gradients are 0, a step of rate 0.5 and decay 0.1 takes 5% of matrices, and nothing of all else."""
    net, parameters, optimizer = built(kind, weight_decay=0.1, lr=0.5)
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for (name, p), old in zip(net.named_parameters(), before, strict=True):
        if p.ndim == 2 and "tok_embeddings" not in name:
            torch.testing.assert_close(p.detach(), 0.95 * old)
        else:
            assert torch.equal(p, old), name


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


@pytest.mark.parametrize(
    ("kind", "after_warmup"),
    [
        ("linear", [8 / 8, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("cosine", [0.5 + 0.5 * math.cos(math.pi * n / 8) for n in range(8)]),
        ("trapezoid", [1, 1, 1, 1, 5 / 6, 5 / 8, 5 / 12, 5 / 24]),  # 4/8 over 0.6, 3/8 over 0.6, ...
        ("constant", [1] * 8),
    ],
)
def test_schedules_by_hand(kind, after_warmup):
    """10 steps of which 2 warm up, to half the peak and to the peak."""
    assert [schedule(kind, step, 10, 0.2) for step in range(10)] == pytest.approx([0.5, 1, *after_warmup])


@pytest.mark.parametrize("kind", ["linear", "cosine", "trapezoid"])
def test_schedules_end_near_0_and_start_at_the_peak_without_warmup(kind):
    assert schedule(kind, 0, 1000, 0) == 1
    assert 0 < schedule(kind, 999, 1000, 0) < 2e-3
