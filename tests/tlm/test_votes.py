"""Votes of many prompts: the majority by hand, the LabelModel against what it should find, a whole evaluation."""

import json

import numpy as np
import pytest

from tlm.cli import main
from tlm.votes import label_model, majority


def test_the_majority_shares_a_tie():
    votes = np.array([[0, 0, 1], [2, 1, 2], [0, 1, 2], [1, 1, 1]])
    np.testing.assert_allclose(majority(votes, np.array([0, 1, 2, 1])), [1, 0, 1 / 3, 1])


def test_the_label_model_trusts_whom_the_others_bear_out():
    """Two good voters and three that guess: the majority is often wrong where the good ones agree."""
    pytest.importorskip("snorkel", reason="pip install -c constraints.txt -e '.[ama]'")
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 3, 400)
    votes = np.stack([np.where(rng.random(400) < p, gold, rng.integers(0, 3, 400)) for p in (0.9, 0.9, 0.1, 0.1, 0)], 1)
    shares = label_model(votes, 3)
    np.testing.assert_allclose(shares.sum(1), 1)
    accuracy = (shares.argmax(1) == gold).mean()
    assert accuracy > majority(votes, gold).mean() + 0.03
    assert accuracy > 0.9
    np.testing.assert_array_equal(shares, label_model(votes, 3))
    assert label_model(votes, 1).tolist() == [[1.0]] * 400
    for same in (np.zeros((20, 5), int), np.zeros((1, 3), int), np.full((20, 3), 2)):  # nobody ever disagrees
        assert (label_model(same, 3).argmax(1) == same[:, 0]).all()


def test_a_run_is_asked_under_many_prompts(pretrained, pool_folder, pool_cache, capsys):
    settings = [f"pool={pool_folder}", f"cache={pool_cache}", "threads=1"]
    assert main(["eval", str(pretrained), *settings, "votes=5"]) == 0
    assert "which are left out: 1" in capsys.readouterr().err
    result = json.loads((pretrained / "votes.json").read_text())
    assert result["by_task"].keys() == {"hidden"}
    assert result["flops"] > 0
    scores = result["all"]
    mean = scores["mean_prompt"]["mean"]
    assert scores["majority_gain"]["mean"] == pytest.approx(scores["majority"]["mean"] - mean)
    assert scores["majority"]["normalised"] == pytest.approx((scores["majority"]["mean"] - 1 / 3) / (2 / 3))
    for more, told in ((["votes=2"], "3 or more"), (["votes=5", "by=generation"], "only scores choices")):
        assert main(["eval", str(pretrained), *settings, *more]) == 2
        assert told in capsys.readouterr().err
