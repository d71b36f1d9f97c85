"""`tlm bench recipe`: its rules, its queue on programs that stand for tlm, its figures against slow ones."""

import fcntl
import itertools
import json
import shutil
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tasks.errors import InputError
from tlm import jobs
from tlm import prepare as preparing
from tlm.batches import pack
from tlm.benches import recipe
from tlm.cli import main
from tlm.config import RecipeConfig, TrainConfig, load, validate
from tlm.evaluate import mlm_loss
from tlm.model import ModelShape, Transformer
from tlm.objectives import Masking, Source
from tlm.plan import fitted, mean_length, micro_batches_a_pass, stage_costs, start_flops
from tlm.prepare import open_task
from tlm.progress import Progress
from tlm.tables import table

QUIET = Progress(quiet=True)
SMALL = [
    "model.hidden=32", "model.layers=2", "model.heads=2", "model.intermediate=48", "model.max_length=32",
    "tokenizer.vocabulary=400", "retrieval.k=20", "joint.batch=8", "finetune.batch=8", "joint.held_out=40",
    "init=random", "joint.mask_rate=0.15",
]  # fmt: skip
BUDGET = 1e9
RECORDS = Path(__file__).parents[2] / "runs" / "reference" / "records"


@pytest.mark.parametrize("path", sorted(RECORDS.rglob("*.yaml")), ids=lambda p: str(p.relative_to(RECORDS)))
def test_each_configuration_of_the_records_is_valid(path):
    config = load(RecipeConfig, [str(path), "data=D", "corpus=C"])
    assert recipe.check(config)
    for setting in config.recipe:
        validate(load(TrainConfig, ["task=D", "corpus=C", setting.rpartition(":")[2]]))


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arguments(tiny_task, tiny_corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    shutil.copytree(tiny_task, folder / "data" / "tiny")
    return [
        "bench", "recipe", "name=mine", f"recipe=[{','.join(SMALL)}]", "tasks=[tiny]", "seeds=2", f"budget={BUDGET}",
        f"data={folder / 'data'}", f"corpus={tiny_corpus}", f"out={folder / 'runs'}", f"cache={folder / 'cache'}",
        f"records={folder / 'records'}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(arguments):
    assert main(arguments) == 0
    (out,) = (a.removeprefix("out=") for a in arguments if a.startswith("out="))
    return Path(out)


def read(path):
    return json.loads(path.read_text())


def test_scores_are_of_dev_and_the_budget_is_kept(finished, tiny_task):
    folder = finished / "mine" / "1e09"
    summary, rival = read(folder / "summary.json"), read(finished / "tfidf" / "tiny" / "summary.json")
    assert rival["test"] is None
    assert [(r["task"], r["seed"]) for r in summary["runs"]] == [("tiny", 0), ("tiny", 1)]
    # 30 dev texts, 10 a label: one label for all has precision 1/3 and recall 1 on one of three labels
    majority = (2 * (1 / 3) / (4 / 3)) / 3
    for number, result in enumerate(summary["runs"]):
        run = read(folder / f"tiny-{number}" / "summary.json")
        assert run["test"] is None
        assert not (folder / f"tiny-{number}" / "predictions.jsonl").exists()
        assert result["score"] == pytest.approx((run["dev"]["macro_f1"] - majority) / (1 - majority))
        assert result["tfidf"] == rival["dev"]["macro_f1"]
        assert run["cost"]["flops"] == result["flops"] == pytest.approx(BUDGET, rel=0.03)
        assert 3 < result["mlm_loss"] < 7  # of 400 word pieces: log(400) is 6
    assert summary["score"] == pytest.approx(statistics.fmean(r["score"] for r in summary["runs"]))
    assert summary["compared"] is None


def test_finished_runs_are_not_repeated_and_compare_as_equal(arguments, finished, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "PROGRAM", ["/bin/false"])
    assert main([*arguments, "against=mine"]) == 0
    assert "+0.00 to mine, p = 1.0000 over 2 pairs" in capsys.readouterr().out


def test_another_recipe_wants_another_name(arguments, finished, capsys):
    assert main([*arguments, f"recipe=[{','.join(SMALL)},finetune.share=0.3]"]) == 2
    assert "holds a run with another configuration" in capsys.readouterr().err


def test_only_the_final_key_reads_test(arguments, finished, capsys):
    assert not list(finished.rglob("test.json"))
    assert main([*arguments, "final=true"]) == 0
    summary = read(finished / "mine" / "1e09" / "final.json")
    assert main(["eval", str(finished / "mine" / "1e09" / "tiny-1"), "split=test"]) == 0
    scored = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["runs"][1]["test"] == scored["macro_f1"]
    assert summary["runs"][1]["tfidf"] == read(finished / "tfidf-final" / "tiny" / "summary.json")["test"]["macro_f1"]


def test_a_run_without_test_does_not_touch_it(tiny_task, tmp_path, monkeypatch):
    of_split, seen = preparing.task_source, []
    monkeypatch.setattr(
        preparing, "task_source", lambda t, split, *rest: seen.append(split) or of_split(t, split, *rest)
    )
    names = [f"task={tiny_task}", f"out={tmp_path}", f"cache={tmp_path}/cache", "run=closed", "test=false", "threads=1"]
    assert main(["train", *names, *SMALL, "joint.held_out=0", "joint.steps=2", "finetune.steps=0"]) == 0
    summary = read(tmp_path / "closed" / "summary.json")
    assert set(seen) == {"train", "dev"}
    assert summary["test"] is None
    assert table({"closed": summary}).row_count == 1
    assert main(["report", str(tmp_path / "closed"), f"out={tmp_path / 'page.html'}"]) == 0
    assert main(["export", str(tmp_path / "closed"), f"out={tmp_path / 'exported'}"]) == 0
    assert "test has not been read" in (tmp_path / "exported" / "README.md").read_text()


# --- the queue ------------------------------------------------------------------------------------------------------

# Notes that it was started, and finishes unless its fault is due.
STANDS_FOR_TLM = """
import json, os, pathlib, signal, sys, time
folder, fault = pathlib.Path(sys.argv[2]), sys.argv[3]
(folder / "ckpt").mkdir(parents=True, exist_ok=True)
with open(folder / "starts", "a") as file:
    file.write("x")
starts = (folder / "starts").stat().st_size
if fault == "killed" or fault == "killed once" and starts == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if fault == "fails":
    sys.exit("tlm: no such thing")
time.sleep(float(fault) if fault[0].isdigit() else 0)
(folder / "summary.json").write_text("{}")
"""


@pytest.fixture
def queue(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "PROGRAM", [sys.executable, "-S", "-c", STANDS_FOR_TLM])
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.05)
    runs = {}

    def make(*faults):
        runs.clear()
        for number, fault in enumerate(faults):
            folder = tmp_path / f"run-{number}"
            runs[fault] = jobs.Planned("any", number, folder, [str(folder), fault], 1.0)
        jobs.queue(list(runs.values()), 2, QUIET)
        return runs

    make.runs = runs
    return make


def starts(run):
    return len((run.folder / "starts").read_text())


def test_a_killed_run_is_started_again_and_a_finished_one_is_not(queue):
    runs = queue("none", "killed once", "0.1")
    assert all(run.finished and not (run.folder / "ckpt").exists() for run in runs.values())
    jobs.queue(list(runs.values()), 2, QUIET)
    assert [starts(run) for run in runs.values()] == [1, 2, 1]


def test_a_run_that_fails_or_is_killed_again_and_again_is_named(queue):
    with pytest.raises(InputError, match="run-0: failed: tlm: no such thing"):
        queue("fails")
    with pytest.raises(InputError, match="run-1: was killed 5 times"):
        queue("none", "killed")


def test_the_others_are_ended_where_one_fails(queue):
    with pytest.raises(InputError):
        queue("30", "fails")
    with open(jobs.log_of(queue.runs["30"])) as log:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds it
    assert not queue.runs["30"].finished


def test_a_run_that_another_bench_makes_is_waited_for(queue, tmp_path):
    run = jobs.Planned("any", 0, tmp_path / "run-0", [str(tmp_path / "run-0"), "0.5"], 1.0)
    other = jobs.start(run)
    assert jobs.start(run) is None
    queue("none")
    assert other.wait() == 0
    assert starts(run) == 1


# --- figures --------------------------------------------------------------------------------------------------------


def results(scores):
    return [dict(task=task, seed=seed, score=score) for (task, seed), score in scores.items()]


def test_p_is_that_of_all_flips_of_signs():
    rng = np.random.default_rng(0)
    pairs = list(itertools.product("ab", range(4)))
    mine, theirs = (dict(zip(pairs, 0.5 + 0.1 * rng.standard_normal(8), strict=True)) for _ in range(2))
    gains = np.array([mine[pair] + 0.05 - theirs[pair] for pair in pairs])
    flips = np.array(list(itertools.product([-1, 1], repeat=8)))
    p = (np.abs((flips * gains).mean(1)) >= abs(gains.mean()) - 1e-12).mean()
    found = recipe.compare(
        results({pair: score + 0.05 for pair, score in mine.items()}),
        {"name": "old", "runs": results(theirs | {("c", 0): 1.0})},
    )
    assert found["p"] == pytest.approx(p)
    assert found["pairs"] == 8
    assert found["difference"] == pytest.approx(gains.mean())
    assert found["by_task"] == pytest.approx({"a": gains[:4].mean(), "b": gains[4:].mean()})


def test_the_cost_to_reach_a_score_is_that_of_the_next_log_line():
    def line(step):
        return dict(kind="train", tokens=10 * step, flops=100 * step, seconds=step, loss=1.0)

    records = [line(10), dict(kind="dev", accuracy=0.5), line(20), dict(kind="dev", accuracy=0.8), line(30), line(40)]
    assert recipe.reached(records, "accuracy", 0.4) == dict(tokens=200, flops=2000, seconds=20)
    assert recipe.reached(records, "accuracy", 0.8) == dict(tokens=300, flops=3000, seconds=30)
    assert recipe.reached(records, "accuracy", 0.9) is None


@pytest.mark.parametrize("extra", [[], ["joint.batch_ramp=0.5", "optimizer=adamw"], ["init=random"]])
def test_the_plan_uses_the_budget_up(tiny_task, tiny_corpus, extra):
    given = [f"task={tiny_task}", f"corpus={tiny_corpus}", "budget=6e12", "finetune.share=0.2", *extra]
    train = validate(load(TrainConfig, given))
    task = open_task(train.task, train.data)
    unlimited = replace(train, finetune=replace(train.finetune, task_passes=0))
    by_share, by_passes = (stage_costs(fitted(config, task), task) for config in (unlimited, train))
    for costs in (by_share, by_passes):
        assert costs["joint"].flops + costs["finetune"].flops + start_flops(train) == pytest.approx(6e12, rel=0.01)
    assert by_share["finetune"].flops == pytest.approx(0.2 * (6e12 - start_flops(train)), rel=0.01)
    a_pass = sum(mean_length([text], 128) for text in task.texts("train"))
    assert by_passes["finetune"].tokens == pytest.approx(4 * a_pass, rel=0.1)  # in whole steps
    found = fitted(train, task)
    of_task = found.joint.steps / (found.joint.external_per_task + 1)
    assert of_task == pytest.approx(4 * micro_batches_a_pass(found, found.joint, task), rel=0.1)
    with pytest.raises(InputError, match="too small"):
        fitted(replace(train, budget=1e6), task)


def test_a_budget_that_the_tasks_passes_use_up_leaves_no_external_text(tiny_task, tiny_corpus):
    given = [f"task={tiny_task}", f"corpus={tiny_corpus}", "init=random", "model.max_length=128"]
    train = validate(load(TrainConfig, given))
    task = open_task(train.task, train.data)
    one_pass = stage_costs(replace(train, corpus=None, joint=replace(train.joint, steps=1000)), task)["joint"].flops
    one_pass *= micro_batches_a_pass(train, train.joint, task) / 1000
    few, many = (fitted(replace(train, budget=2 * passes * one_pass), task) for passes in (3, 40))
    assert few.joint.external_per_task == 0
    assert many.joint.external_per_task > 3
    assert fitted(replace(train, joint=replace(train.joint, steps=2)), task).joint.external_per_task == 1


def test_held_out_passages_are_no_others():
    whole = Source(lambda i: np.array([i]), np.arange(50))
    rest, held_out = preparing.hold_out(whole, 20)
    assert (len(rest), len(held_out)) == (30, 20)
    assert sorted(int(part.sequence(i)[0]) for part in (rest, held_out) for i in range(len(part))) == list(range(50))
    assert all(part.lengths[i] == part.sequence(i)[0] for part in (rest, held_out) for i in range(len(part)))
    with pytest.raises(InputError, match="but 50 passages"):
        preparing.hold_out(whole, 50)


def test_the_masked_lm_loss_is_that_of_one_text_at_a_time():
    rng = np.random.default_rng(0)
    texts = [rng.integers(5, 300, length) for length in rng.integers(3, 30, 40)]
    source = Source(lambda i: texts[i], np.array([len(text) for text in texts]))
    model = Transformer(ModelShape(300, 32, 2, 2, 48, 32, 3), torch.Generator().manual_seed(0))
    masking = Masking(0.15, 300, 5, 4, seed=0)
    total, count = 0.0, 0
    for i in range(40):
        inputs, targets = (torch.from_numpy(row) for row in masking(texts[i], "held out", i))
        batch = pack([inputs.numpy()])
        total += F.cross_entropy(model.mlm_logits(model(batch)), targets, reduction="sum").item()
        count += int((targets != -100).sum())
    assert mlm_loss(model, source, masking) == pytest.approx(total / count, rel=1e-4)


# --- records and rules ----------------------------------------------------------------------------------------------


def test_a_record_is_kept_if_it_is_better_beyond_chance(tmp_path):
    def attempt(name, scores):
        config = RecipeConfig(name=name, recipe=["joint.lr=1e-3"], budget=6e12, record=name, records=str(tmp_path))
        runs = results(dict(zip(itertools.product("ab", range(3)), scores, strict=True)))
        compared = recipe.compare(runs, recipe.find_opponent(config))
        summary = dict(name=name, budget=config.budget, compared=compared, runs=runs)
        return recipe.keep_record(config, summary, QUIET)

    assert attempt("first", [0.1] * 6) == 0
    assert attempt("worse", [0.05] * 6) == 1
    assert attempt("chance", [0.2, 0.2, 0.2, 0.0, 0.0, 0.05]) == 1
    assert attempt("better", [0.2] * 6) == 0  # p = 2 / 2^6
    assert attempt("between", [0.15] * 6) == 1  # the last record counts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["01-first", "02-better"]
    assert read(tmp_path / "02-better" / "summary.json")["compared"]["with"] == "01-first"
    kept = load(RecipeConfig, [str(tmp_path / "02-better" / "config.yaml")])
    assert (kept.name, kept.recipe, kept.budget) == ("better", ["joint.lr=1e-3"], 6e12)
    other = RecipeConfig(budget=1e14, records=str(tmp_path))
    assert recipe.find_opponent(other) is None  # no record of that budget


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["tasks=[trec,sst2]"], "sst2]: held out, not to be tuned on"),
        (["tasks=[../data/sst2]"], "must be a plain name"),
        (["tasks=[absent]"], "absent"),
        (["name=tfidf"], "is the rival's"),
        (["name=a/b"], "must be a plain name"),
        (["recipe=[joint.steps=5]"], "is not to be set here"),
        (["recipe=[data.train_limit=5]"], "is not to be set here"),
        (["recipe=[imdb:test=true]"], "is not to be set here"),
        (["recipe=[sst2:model=small]"], "is none of the tasks that can be named here; use one of sciie, "),
        (["recipe=[imbd:model=small]"], "is none of the tasks that can be named here; use one of sciie, "),
        (["recipe=[fast]"], "must be key=value"),
        (["record=x", "tasks=[trec]"], "on dev of the whole yardstick"),
        (["record=x", "seeds=2"], "with 3 seeds"),
        (["record=x", "final=true"], "on dev"),
        (["record=x", "against=y"], "against the last record"),
        (["against=absent"], "absent/1.2e13/summary.json: no such file"),
        (["recipe=[finetune.share=1]"], "must be a share"),
        (["name="], "key name needs a value"),
    ],
)
def test_what_breaks_the_rules_is_one_sentence_and_status_2(given, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "recipe", "name=mine", "data=data", "corpus=corpus", *given]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
