"""`tlm bench zeroprompt`: arms that differ as asked, scored on what they never saw, with intervals one can check."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from tlm.benches import zeroprompt
from tlm.cli import main
from tlm.run import read_json

SMALL = (
    "[model.hidden=32,model.layers=2,model.heads=2,model.intermediate=48,model.max_length=48,tokenizer.vocabulary=320,"
    "joint.batch=6,joint.dev=20]"
)
ARMS = ["one pool.tasks=1", "all", "wide model.hidden=64", "lm +corpus retrieval.selector=random share=0.5",
        "then init_from=@lm share=0.5", "but-numbers without=numbers"]  # fmt: skip
CONFIGS = Path(__file__).parents[2] / "configs" / "zeroprompt"


@pytest.fixture
def ask(pool_folder, pool_cache, tiny_corpus, tmp_path):
    def arguments(arms, *more):
        keys = [f"pool={pool_folder}", f"corpus={tiny_corpus}", f"cache={pool_cache}", f"out={tmp_path}"]
        listed = "[" + ",".join(f"'{arm}'" for arm in arms) + "]"
        return ["bench", "zeroprompt", "name=study", *keys, f"arms={listed}", f"settings={SMALL}", "budget=2e9", *more]

    return arguments


def test_arms_are_trained_and_scored_once(ask, tmp_path, jobs_here, capsys):
    assert main(ask(ARMS, "seeds=1", "jobs=1")) == 0
    found = read_json(tmp_path / "study" / "study.json")
    # `lm`, where another starts, is no rival
    assert list(found["scores"]) == ["one", "all", "wide", "then", "but-numbers"]
    assert found["scores"]["one"]["trained_tasks"] == 1
    assert list(found["scores"]["all"]["by_category"]) == ["riddles"]
    assert list(found["scores"]["but-numbers"]["by_category"]) == ["numbers"]
    assert "beside_first" not in found["scores"]["one"]
    assert set(found["learning"]) == {"all", "wide"}  # the same tasks
    assert found["learning"]["all"]["goal"] == max(of["loss"] for of in found["learning"].values())
    (run,) = found["runs"]["all"]
    written = read_json(tmp_path / "study" / "all-0" / "zeroshot.json")
    assert run["tasks"] == {"hidden": pytest.approx(written["by_task"]["hidden"]["sum"]["normalised"], abs=1e-5)}
    assert run["balanced"] == {
        "hidden": pytest.approx(written["by_task"]["hidden"]["balanced"]["normalised"], abs=1e-5)
    }
    assert found["scores"]["all"]["balanced"]["mean"] == pytest.approx(run["balanced"]["hidden"])
    assert 0.7 * 2e9 < run["flops"] < 1.3 * 2e9
    start = read_json(tmp_path / "study" / "then-0" / "summary.json")["init_from"]
    assert start["folder"] == f"{tmp_path}/study/lm-0/model"
    assert start["cost"]["flops"] == pytest.approx(1e9, rel=0.3)
    assert (tmp_path / "study" / "study.png").stat().st_size > 10_000
    assert "but-numbers" in capsys.readouterr().out

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("*.json") if path.stem != "study"}
    assert main(ask(ARMS, "seeds=1", "jobs=1")) == 0
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert main(ask(ARMS[:1], "seeds=1", "jobs=1", "limit=3")) == 0  # other scores are made anew
    assert read_json(tmp_path / "study" / "one-0" / "zeroshot.json")["instances"] == 6


def test_an_interval_is_that_of_tasks_and_seeds():
    rng = np.random.default_rng(1)
    tasks, seeds = 60, 3
    scores = 0.2 + rng.normal(0, 0.3, (tasks, 1)) + np.array([[-0.05, 0.0, 0.05]])
    found = zeroprompt.interval(scores)
    low, high = found["interval"]
    expected = np.sqrt(0.3**2 / tasks + np.var([-0.05, 0, 0.05]) / seeds)
    assert found["mean"] == pytest.approx(scores.mean())
    assert (high - low) / (2 * 1.96) == pytest.approx(expected, rel=0.2)


def test_the_difference_is_between_the_same_tasks():
    first = [{"tasks": {"a": 0.1, "b": 0.5}, "trained_tasks": 1, "examples": 1, "parameters": 1}]
    other = [{"tasks": {"b": 0.7, "c": 0.0}, "trained_tasks": 2, "examples": 1, "parameters": 1}]
    found = zeroprompt.figures(other, first, {"a": "x", "b": "x", "c": "y"})
    assert found["beside_first"]["mean"] == pytest.approx(0.2)
    assert found["beside_first"]["tasks"] == 1
    assert found["all"]["mean"] == pytest.approx(0.35)


def test_flops_to_a_loss_by_hand():
    def records(losses):
        rows = []
        for step, loss in enumerate(losses, 1):
            rows += [{"kind": "dev", "loss": loss}, {"kind": "train", "loss": 9.0, "flops": 10.0**step}]
        return rows

    curves = {
        "slow": zeroprompt.loss_curve([records([6.0, 5.0, 4.0]), records([6.0, 5.0, 4.0])]),
        "fast": zeroprompt.loss_curve([records([5.0, 3.0, 3.5]), records([5.0, 3.0, 2.5])]),
        "other": zeroprompt.loss_curve([records([1.0, 0.5])]),
    }
    found = zeroprompt.side_by_side(curves, {"slow": ("a",), "fast": ("a",), "other": ("b",)})
    assert list(found) == ["slow", "fast"]  # the other has nothing to be compared with
    assert found["slow"] == {"loss": 4.0, "goal": 4.0, "flops": pytest.approx(1e3), "at_most": False, "times": 1.0}
    assert found["fast"]["loss"] == pytest.approx(2.75)  # of 3.0 and 2.5, the least of each seed
    assert found["fast"]["flops"] == pytest.approx(10**1.5)  # half of the way from 5 to 3, in the logarithm
    assert found["fast"]["times"] == pytest.approx(10**1.5)
    early = curves | {"fast": zeroprompt.loss_curve([records([3.0, 2.0])])}
    found = zeroprompt.side_by_side(early, {"slow": ("a",), "fast": ("a",), "other": ("b",)})
    assert found["fast"]["at_most"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_in_configs_are_well_formed(path):
    content = yaml.safe_load(path.read_text())
    assert content["name"] == path.stem
    assert all(zeroprompt.parse_arm(arm) for arm in content["arms"])


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ([], "nothing to run"),
        (["a/b"], "plain name"),
        (["a", "a"], "listed twice"),
        (["a pool.task=3"], "unknown key pool.task"),
        (["a seed=3"], "seed is the bench's to set"),
        (["a corpus"], "neither key=value nor +corpus"),
        (["a share=2"], "must be a share of the budget"),
        (["a share=much"], "must be a share of the budget"),
        (["a init_from=@b"], "which is no other arm"),
        (["a init_from=@a"], "which is no other arm"),
        (["a", "b init_from=@a", "c init_from=@b"], "starts from another"),
        (["a without=nothing"], "nothing"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(ask, arms, said, tmp_path, capsys):
    assert main(ask(arms)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_text_that_is_asked_for_must_be_given(pool_folder, tmp_path, capsys):
    asked = ["bench", "zeroprompt", "name=study", f"pool={pool_folder}", f"out={tmp_path}", "arms=['a +corpus']"]
    assert main(asked) == 2
    assert "corpus= is missing" in capsys.readouterr().err
