"""The joint loss against the formula by hand, finite differences, and itself in other cuts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tlm.batches import IGNORE
from tlm.mixture import EXTERNAL, TASK, Mixture
from tlm.model import ModelShape, Transformer
from tlm.objectives import Losses, Masking, Mixup, Objective, Source
from tlm.tokenizer import CLS, MASK, SEP, SPECIALS

VOCABULARY, LABELS, RHO2 = 30, 3, 4.0
ORDINARY = len(SPECIALS)


def source(size: int, labels: bool, seed: int) -> Source:
    rng = np.random.default_rng(seed)
    texts = [np.r_[CLS, rng.integers(ORDINARY, VOCABULARY, rng.integers(3, 12)), SEP] for _ in range(size)]
    return Source(
        texts.__getitem__, np.array([len(t) for t in texts]), rng.integers(0, LABELS, size) if labels else None
    )


SOURCES = {EXTERNAL: source(64, False, 1), TASK: source(48, True, 2)}


def objective(mlm_weight=RHO2, rate=0.3):
    masking = Masking(rate, VOCABULARY, ORDINARY, MASK, seed=7)
    return Objective(SOURCES, mlm_weight, masking if rate else None)


def mixture(batch, rho1=1, accumulation=1):
    return Mixture(0, {EXTERNAL: 64, TASK: 48}, {EXTERNAL: batch, TASK: batch}, rho1, accumulation)


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = ModelShape(VOCABULARY, 16, 2, 2, 24, 32, LABELS)
    model = Transformer(shape, torch.Generator().manual_seed(1), residual_init="scaled").double()
    with torch.no_grad():  # away from the start, where much is zero
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def step_loss(model, micros, objective, rank=0, world=1):
    losses, total = Losses(model), 0.0
    for micro in objective.step(micros, rank, world):
        mlm, task = losses(micro.batch, micro.mlm > 0, micro.task > 0)
        total = total + sum(w * s for w, s in ((micro.mlm, mlm), (micro.task, task)) if s is not None)
    return total


def by_hand(model, micro, weight=RHO2):
    """(mean masked-LM loss, mean task loss) of one micro-batch, one text at a time, by the textbook formulas."""
    from tlm.batches import pack

    masked, tasks = [], []
    for (inputs, targets), example in zip(objective().examples(micro), micro.examples, strict=True):
        batch = pack([inputs])
        hidden = model(batch)
        log_p = model.mlm_logits(hidden).log_softmax(-1)
        masked += [-log_p[i, t] for i, t in enumerate(targets) if t != IGNORE]
        if micro.source == TASK:
            label = SOURCES[TASK].labels[example]
            tasks.append(-model.classify(hidden, batch).log_softmax(-1)[0, label])
    return torch.stack(masked).mean(), torch.stack(tasks).mean() if tasks else None


def test_an_external_micro_batch_is_plain_masked_lm(model):
    micro = mixture(8).micro_batch(0)
    assert micro.source == EXTERNAL
    assert step_loss(model, [micro], objective()).item() == pytest.approx(by_hand(model, micro)[0].item(), rel=1e-10)


def test_a_task_micro_batch_is_the_papers_joint_loss(model):
    micro = mixture(8).micro_batch(1)
    assert micro.source == TASK
    mlm, task = by_hand(model, micro)
    expected = (RHO2 * mlm + task) / (RHO2 + 1)
    assert step_loss(model, [micro], objective()).item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("part", ["mlm", "task", "joint"])
def test_gradients_agree_with_finite_differences(model, part):
    micro = mixture(4).micro_batch(0 if part == "mlm" else 1)
    aim = objective(mlm_weight=0.0) if part == "task" else objective()
    step_loss(model, [micro], aim).backward()
    rng = np.random.default_rng(0)
    for name, p in model.named_parameters():
        if p.grad is None:
            continue
        for _ in range(3):
            i, h = tuple(rng.integers(0, n) for n in p.shape), 1e-6
            with torch.no_grad():
                value = p[i].item()
                p[i] = value + h
                above = step_loss(model, [micro], aim).item()
                p[i] = value - h
                below = step_loss(model, [micro], aim).item()
                p[i] = value
            assert p.grad[i].item() == pytest.approx((above - below) / (2 * h), rel=1e-4, abs=1e-8), name


@pytest.mark.parametrize("rho1", [0, 10**6])
def test_four_micro_batches_of_8_give_what_one_of_32_gives(model, rho1):
    def gradients(batch, accumulation):
        model.zero_grad()
        m = mixture(batch, rho1, accumulation) if rho1 else Mixture(0, {TASK: 48}, {TASK: batch}, 0, accumulation)
        loss = step_loss(model, m.draw(0), objective())
        loss.backward()
        return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    (loss, small), (other, large) = gradients(8, 4), gradients(32, 1)
    assert loss == pytest.approx(other, rel=1e-12)
    for a, b in zip(small, large, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_give_what_one_gives(model, world):
    micros = mixture(12, rho1=1, accumulation=2).draw(0)
    alone = step_loss(model, micros, objective()).item()
    together = sum(step_loss(model, micros, objective(), rank, world).item() for rank in range(world))
    assert together == pytest.approx(alone, rel=1e-12)


def mixing():
    return replace(objective(mlm_weight=0.0), mixup=Mixup(0.4, seed=3))


@pytest.mark.parametrize("texts", [8, 7])
def test_mixed_pairs_are_classified_by_the_formula(model, texts):
    """Manifold mixup at the pooled state, a text at a time; the last of an odd number stays as it is."""
    from tlm.batches import pack

    micro = Mixture(0, {TASK: 48}, {TASK: texts}, 0).micro_batch(3)
    states, expected = [], 0.0
    for example in micro.examples:
        batch = pack([SOURCES[TASK].sequence(example)])
        states.append(model(batch).mean(0))
    shares = Mixup(0.4, seed=3)(TASK, micro.positions)
    assert shares.min() >= 0.5
    for i, own in enumerate(shares.tolist()):
        other = min(i + 1 - 2 * (i % 2), texts - 1)
        logits = model.classifier(model.head(own * states[i] + (1 - own) * states[other]))
        for share, text in ((own, i), (1 - own, other)):
            expected -= share * logits.log_softmax(-1)[SOURCES[TASK].labels[micro.examples[text]]] / texts
    assert step_loss(model, [micro], mixing()).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_mixed_pairs_stay_together_over_parts_and_processes(model, world):
    micro = Mixture(0, {TASK: 48}, {TASK: 11}, 0).micro_batch(1)
    losses = Losses(model)
    alone, cut = (
        sum(
            m.task * losses(m.batch, False, True)[1]
            for rank in range(n)
            for m in mixing().step([micro], rank, n, most_tokens=most)
        ).item()
        for n, most in ((1, None), (world, 20))
    )
    assert cut == pytest.approx(alone, rel=1e-6)


def test_shares_are_beta_distributed():
    from scipy.stats import beta, kstest

    shares = Mixup(0.4, seed=0)(TASK, np.arange(2000))
    assert kstest(shares, lambda x: 2 * (beta.cdf(x, 0.4, 0.4) - 0.5)).pvalue > 0.01
    assert np.array_equal(shares[100:110], Mixup(0.4, seed=0)(TASK, np.arange(100, 110)))


def test_losses_that_are_off_are_not_computed(model):
    task = mixture(8).micro_batch(1)
    (micro,) = objective(mlm_weight=0.0).step([task])
    assert micro.mlm == 0.0
    assert len(micro.batch.masked) == 0
    mlm, cls = Losses(model)(micro.batch, micro.mlm > 0, micro.task > 0)
    assert mlm is None
    assert cls is not None
    mlm, cls = Losses(model)(objective().step([mixture(8).micro_batch(0)])[0].batch, True, False)
    assert cls is None


def test_masking_is_berts():
    """Over many texts: 30% chosen; of these 80% [MASK], 10% another token, 10% as it was; specials never."""
    masking, rng = Masking(0.3, VOCABULARY, ORDINARY, MASK, seed=1), np.random.default_rng(0)
    chosen = replaced = kept = ordinary = 0
    for position in range(2000):
        text = np.r_[CLS, rng.integers(ORDINARY, VOCABULARY, 40), SEP]
        inputs, targets = masking(text, EXTERNAL, position)
        at = targets != IGNORE
        assert np.array_equal(targets[at], text[at])
        assert np.array_equal(inputs[~at], text[~at])
        assert not at[[0, -1]].any()
        ordinary += 40
        chosen += at.sum()
        replaced += (inputs[at] == MASK).sum()
        kept += (inputs[at] == text[at]).sum()
    assert chosen / ordinary == pytest.approx(0.3, abs=0.01)
    assert replaced / chosen == pytest.approx(0.8, abs=0.01)
    assert kept / chosen == pytest.approx(0.1 + 0.1 / (VOCABULARY - ORDINARY), abs=0.01)


def test_a_short_text_still_has_one_masked_token():
    masking = Masking(0.01, VOCABULARY, ORDINARY, MASK, seed=1)
    for position in range(200):
        _, targets = masking(np.array([CLS, 9, 8, SEP]), TASK, position)
        assert (targets != IGNORE).sum() >= 1


def test_all_losses_use_the_same_cross_entropy(model):
    """Guards the weights' denominators: with all tokens masked the loss is cross-entropy over the whole batch."""
    micro = mixture(6).micro_batch(0)
    (weighted,) = objective(rate=0.3).step([micro])
    logits = model.mlm_logits(model(weighted.batch)[weighted.batch.masked])
    expected = F.cross_entropy(logits, weighted.batch.masked_tokens)
    assert step_loss(model, [micro], objective()).item() == pytest.approx(expected.item(), rel=1e-12)


def test_each_source_is_masked_at_its_own_rate():
    masking, text = Masking(0.5, VOCABULARY, ORDINARY, MASK, seed=7, task_rate=0.1), np.full(4000, 9)
    for name, rate in ((EXTERNAL, 0.5), (TASK, 0.1)):
        assert (masking(text, name, 0)[1] != IGNORE).mean() == pytest.approx(rate, abs=0.03)


def test_tokens_are_hidden_where_nothing_is_asked_of_them():
    hiding = Masking(0.3, VOCABULARY, ORDINARY, MASK, seed=7)
    micro = mixture(6, rho1=0).micro_batch(0)
    plain, hidden = (Objective({TASK: SOURCES[TASK]}, 0.0, None, h).step([micro])[0] for h in (None, hiding))
    assert (plain.batch.tokens != MASK).all()
    assert (hidden.batch.tokens == MASK).any()
    assert not len(hidden.batch.masked)
    assert hidden.mlm == 0.0


def test_offsets_are_added_to_the_logits_in_training(model):
    offsets = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    (weighted,) = objective(mlm_weight=0.0, rate=0).step([mixture(6, rho1=0).micro_batch(1)])
    logits = model.classify(model(weighted.batch), weighted.batch)
    expected = F.cross_entropy(logits + offsets, weighted.batch.labels, reduction="sum")
    found = Losses(model, offsets)(weighted.batch, False, True)[1]
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
