"""`tlm compare`: its plan on runs that a stand-in makes at once, one whole comparison on the tiny task, its figures."""

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import write_jsonl

from tasks.metrics import METRICS
from tlm import compare, compare_report, curves, evaluate, jobs
from tlm.cli import main
from tlm.compare import open_study, parse_arm
from tlm.compare_report import ratio_sentence
from tlm.config import CompareConfig, TrainConfig, load, validate
from tlm.ledger import Ledger
from tlm.prepare import open_task
from tlm.run import Run, write_json, write_text
from tlm.versus import Decision, Point, best_so_far, break_even, flat_from, flops_to, mean_curve, score_at

SMALL = [
    "model.hidden=32", "model.layers=2", "model.heads=2", "model.intermediate=48", "model.max_length=32",
    "tokenizer.vocabulary=400", "retrieval.k=20", "joint.batch=8", "finetune.batch=8", "init=random",
    "joint.mask_rate=0.15",
]  # fmt: skip
CONFIGS = Path(__file__).parents[2] / "configs" / "compare"
ARMS = ("tfidf", "scratch", "tlm", "tlm:joint.external_per_task=0", "pt-ft", "pt-ft+tapt")


def read(path):
    return json.loads(Path(path).read_text())


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0)


@pytest.fixture
def ask(tiny_task, tiny_corpus, tmp_path):
    """The arguments of a comparison; keys given by name replace these."""

    def arguments(**keys):
        given = {
            "task": tiny_task, "corpus": tiny_corpus, "arms": f"[{','.join(ARMS)}]", "seeds": 2, "budget": 2e9,
            "pretraining": 4, "checkpoints": 2, "tries": 4, "leaks": "drop",
            "settings": f"[{','.join(SMALL)}]", "out": tmp_path / "out", "cache": tmp_path / "cache",
            "price_per_hour": 10,
        } | keys  # fmt: skip
        return [f"{key}={value}" for key, value in given.items()]

    return arguments


# --- a stand-in for training ----------------------------------------------------------------------------------------


class StandIn:
    """A run made at once, in the place of a process: right as often as its settings deserve."""

    made = ()  # Planned
    fails = "nothing fails"

    def __init__(self, run):
        self.made.append(run)
        self.returncode = 2 if self.fails in str(run.folder) else 0
        if self.returncode:
            write_text(jobs.log_of(run), "tlm: the disk is full\n")
            return
        config = validate(load(TrainConfig, list(run.settings)))
        task, ledger = open_task(config.task, config.data), Ledger(flops=int(run.flops), seconds={"joint": 2.0})
        folder = Run(run.folder, config)
        folder.begin([dict(i) for i in task.inputs])
        own = ledger.cost(100, config.price_per_hour)
        summary = {
            "name": run.folder.name, "task": task.name, "metric": task.metric, "labels": list(task.labels),
            "arm": "any", "seed": config.seed, "dev": None, "test": None, "cost": own, "selection": None,
        }  # fmt: skip
        if config.task == "none":
            spent = read(Path(config.init_from) / "cost.json")["flops"] if config.init_from else 0
            for name in ("model", *(f"at-{step:06d}" for step in config.joint.keep_at)):
                share = int(name[3:]) / config.joint.steps if name != "model" else 1
                write_json(run.folder / name / "cost.json", own | {"flops": spent + int(share * run.flops)})
        else:
            rng = np.random.default_rng([config.seed, len(str(run.folder))])
            for split in ("dev", *(["test"] if config.test else [])):
                gold = np.array(task.targets(split))
                wrong = rng.random(len(gold)) > skill(config)
                shares = np.eye(len(task.labels))[(gold + wrong) % len(task.labels)] * 0.9 + 0.05
                shares /= shares.sum(1, keepdims=True)
                summary[split] = (
                    evaluate.test_scores(task, shares) if split == "test" else evaluate.scores(shares, gold)
                )
                summary[split]["macro_f1"] = skill(config) if split == "dev" else summary[split]["macro_f1"]
                if split == "test":
                    write_text(run.folder / "predictions.jsonl", evaluate.prediction_lines(task, shares))
            for step in (1, 2):
                folder.record(stage="joint", step=step, kind="dev", macro_f1=skill(config) * step / 2)
                folder.record(stage="joint", step=step, kind="train", flops=int(run.flops) * step // 2)
        write_json(folder.summary_path, summary)

    def poll(self):
        return self.returncode


def skill(config) -> float:
    if config.model.size == "tfidf":
        return 0.5
    better = 0.05 * (config.joint.mlm_weight == 20) + 0.05 * (config.finetune.lr == 3e-4)
    if config.init_from:
        return 0.7 + better + (0.1 if "tapt" in config.init_from else 0.0) - (0.3 if "at-" in config.init_from else 0.0)
    return (0.85 if config.corpus else 0.3) + better


@pytest.fixture
def made(monkeypatch, request):
    """The runs that were made, by stand-ins; plots are drawn where a test's name holds `report`."""
    monkeypatch.setattr(StandIn, "made", [])
    monkeypatch.setattr(jobs, "start", StandIn)
    if "report" not in request.node.name:
        for module in (curves, compare_report):
            monkeypatch.setattr(module, "render", lambda *_, **__: b"a picture")
    return StandIn.made


def names(made):
    return [str(Path(*run.folder.parts[-2:])) for run in made]


def test_the_plan_makes_each_run_once_and_reads_test_last(ask, made, tmp_path, tiny_task):
    assert main(["compare", *ask()]) == 0
    found, task = names(made), tiny_task.name
    assert len(found) == len(set(found))
    arms = ("tlm", "scratch", "pt-ft", "pt-ft+tapt")
    tuned = {arm: [n for n in found if re.match(rf"tuning/{re.escape(arm)}-\d", n)] for arm in arms}
    assert {arm: len(runs) for arm, runs in tuned.items()} == dict.fromkeys(arms, 6)
    of_test = [run for run in made if "test=true" in run.settings]
    finals = [f"{task}/{n}" for n in ("tfidf-0", "scratch-0", "scratch-1", "tlm-0", "tlm-1", "pt-ft-0", "pt-ft-1")]
    finals += [f"{task}/{n}-{s}" for n in ("tlm_joint.external_per_task=0", "pt-ft+tapt") for s in (0, 1)]
    assert sorted(names(of_test)) == sorted(finals)
    for arm in tuned:  # after everything was chosen
        last_tuned = max(found.index(n) for n in tuned[arm])
        assert all(found.index(f"{task}/{arm}-{seed}") > last_tuned for seed in (0, 1))
    assert sum(name.startswith("pretraining/trunk") for name in found) == 1
    trunk, *cooled = [found.index(name) for name in found if name.startswith("pretraining/")]
    assert trunk == 0
    assert max(cooled) < 4  # the longest first: other runs wait, though they could be made sooner
    assert found[cooled[0]] > found[cooled[1]]

    before = list(made)
    assert main(["compare", *ask()]) == 0  # nothing is left to do
    assert made == before

    assert {n for n in found if "-at0-" in n} == {f"{task}/pt-ft-at0-0", f"{task}/pt-ft-at0-1"}
    (of_task,) = read(tmp_path / "out" / "summary.json")["tasks"].values()
    the_budget_is_alike_and_the_best_settings_are_chosen(of_task, made)


def the_budget_is_alike_and_the_best_settings_are_chosen(of_task, made):
    assert "joint.mlm_weight=20.0" in of_task["tlm"]["chosen"]
    assert "finetune.lr=0.0003" in of_task["pt-ft"]["chosen"]
    tuned = [run for run in made if run.folder.parent.name == "tuning"]
    of_arm = {arm: [r for r in tuned if re.match(rf"{re.escape(arm)}-\d", r.folder.name)] for arm in of_task}
    for arm in ("tlm", "scratch", "pt-ft"):  # four at a quarter, two at a half
        assert sum(run.flops for run in of_arm[arm]) == pytest.approx(2 * 2e9)
    assert of_task["tlm"]["cost"]["tuning"]["flops"] == pytest.approx(4e9, rel=1e-6)
    fixed = [run for run in tuned if run.folder.name.startswith("tlm_joint")]
    assert len(fixed) == 6
    assert all(run.settings.count("joint.external_per_task=0") == 1 for run in fixed)


def test_checkpoints_are_trapezoids_of_their_own_length(ask, made, tmp_path):
    study = open_study(validate(load(CompareConfig, ask())))
    trunk, branches = study.pretraining()
    settings = dict(s.split("=", 1) for s in trunk.settings)
    assert settings["joint.schedule"] == "constant"
    at = json.loads(settings["joint.keep_at"])
    for place, branch, flops in zip(at, branches, study.checkpoints, strict=True):
        own = dict(s.split("=", 1) for s in branch.settings)
        assert own["init_from"].endswith(f"/at-{place:06d}")
        assert int(own["joint.steps"]) / (place + int(own["joint.steps"])) == pytest.approx(0.6, abs=0.03)
        assert branch.flops == pytest.approx(0.6 * flops)
    assert study.checkpoints == [2e9, 8e9]
    assert len(list(tmp_path.rglob("config.yaml"))) == 0


def test_without_a_curve_the_last_checkpoint_alone_is_finetuned(ask, made, tmp_path):
    whole, short = (open_study(validate(load(CompareConfig, ask(arms="[pt-ft]", curve=c)))) for c in ("true", "false"))
    (pt_ft,) = short.arms
    assert whole.flops() - short.flops() == pytest.approx(2 * short.full(pt_ft, *short.tasks))  # two seeds
    assert main(["compare", *ask(arms="[pt-ft]", curve="false")]) == 0
    assert [n for n in names(made) if "-at" in n] == []
    assert {f"{task}/pt-ft-{seed}" for task in short.tasks for seed in (0, 1)} <= set(names(made))
    (of_task,) = read(tmp_path / "out" / "summary.json")["tasks"].values()
    assert len(of_task["pt-ft"]["curve"]) == 1


def test_what_failed_is_told_and_what_has_not_is_kept(ask, made, tmp_path, monkeypatch, capsys, tiny_task):
    monkeypatch.setattr(StandIn, "fails", f"{tiny_task.name}/tlm-1")
    given = ask(arms="[tfidf,scratch,tlm]", tries=1)
    assert main(["compare", *given]) == 1
    page = (tmp_path / "out" / "report.md").read_text()
    assert "tlm-1: failed: tlm: the disk is full" in page
    assert f"tlm on {tiny_task.name}: 1 of 2 runs have finished" in page
    (of_task,) = read(tmp_path / "out" / "summary.json")["tasks"].values()
    kept = {arm: len(found["runs"]) for arm, found in of_task.items()}
    assert kept == {"tfidf": 1, "scratch": 2, "tlm": 1}
    monkeypatch.setattr(StandIn, "fails", "nothing fails")
    made.clear()
    assert main(["compare", *given]) == 0
    assert names(made) == [f"{tiny_task.name}/tlm-1"]


def test_where_pretraining_fails_the_other_arms_go_on(ask, made, tmp_path, monkeypatch):
    monkeypatch.setattr(StandIn, "fails", "trunk")
    assert main(["compare", *ask(arms="[tlm,pt-ft,pt-ft+tapt]", tries=1)]) == 1
    (of_task,) = read(tmp_path / "out" / "summary.json")["tasks"].values()
    assert {arm: len(found["runs"]) for arm, found in of_task.items()} == {"tlm": 2, "pt-ft": 0, "pt-ft+tapt": 0}


def test_what_an_arm_fixes_is_not_tuned(ask, tiny_task):
    study = open_study(validate(load(CompareConfig, ask())))
    found = study.candidates(parse_arm("tlm:model.dropout=0.1"), tiny_task.name)
    assert found == [(), ("joint.mlm_weight=20.0",)]


def test_with_few_labels_finetuning_takes_the_least_of_steps(ask, tiny_task):
    few = open_study(validate(load(CompareConfig, ask(budget=1e9, tries=1))))
    alone = ask(budget=1e11, tries=1, settings=f"[{','.join(SMALL)},joint.external_per_task=0]")
    many = open_study(validate(load(CompareConfig, alone)))
    assert few.finetuning(tiny_task.name)[0] == 200 < many.finetuning(tiny_task.name)[0]


def test_finetuning_reads_the_task_as_often_as_tlm_does(ask, tiny_task, jobs_here, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "LEAST_STEPS", 1)
    keys = dict(arms="[tlm,pt-ft]", seeds=1, tries=1, checkpoints=1, pretraining=1, budget=1e9)
    assert main(["compare", *ask(**keys)]) == 0
    out = tmp_path / "out" / tiny_task.name
    tlm, pretrained = (read(out / f"{arm}-0" / "summary.json") for arm in ("tlm", "pt-ft"))
    assert tlm["cost"]["flops"] == pytest.approx(1e9, rel=0.1)
    of_task = tlm["cost"]["tokens"] - tlm["data"]["external_tokens_seen"]
    assert pretrained["cost"]["tokens"] == pytest.approx(of_task, rel=0.3)  # lengths are estimated from words


def test_costs_hold_the_pretraining_once_and_tapt_each_time(ask, made, tmp_path, tiny_task):
    assert main(["compare", *ask(arms="[tlm,pt-ft,pt-ft+tapt]", tries=1)]) == 0
    (of_task,) = read(tmp_path / "out" / "summary.json")["tasks"].values()
    plain, between = (of_task[arm]["cost"] for arm in ("pt-ft", "pt-ft+tapt"))
    steps, finetuning = open_study(validate(load(CompareConfig, ask()))).finetuning(tiny_task.name)
    assert made[-1].settings.count(f"finetune.steps={steps}") == 1
    assert plain["shared"] == between["shared"]
    assert plain["shared"]["flops"] == pytest.approx(8e9, rel=0.01)
    assert plain["own"]["flops"] == pytest.approx(finetuning)
    assert between["own"]["flops"] == pytest.approx(2 * finetuning)
    assert of_task["tlm"]["cost"]["shared"]["flops"] == 0
    assert plain["own"]["money"] == pytest.approx(10 * 2 / 3600, rel=0.01)
    assert [p["flops"] / 1e9 for p in of_task["pt-ft"]["curve"]] == pytest.approx(
        [2 + finetuning / 1e9, 8 + finetuning / 1e9], rel=0.01
    )


def test_other_data_is_refused(ask, made, tiny_task, tmp_path, capsys):
    task = shutil.copytree(tiny_task, tmp_path / "changing")
    assert main(["compare", *ask(task=task, arms="[tfidf,scratch]")]) == 0
    lines = (task / "dev.jsonl").read_text().splitlines()
    write_text(task / "dev.jsonl", "\n".join(reversed(lines)) + "\n")
    before = (tmp_path / "out" / "report.html").read_bytes()
    assert main(["compare", *ask(task=task, arms="[tfidf,scratch]")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "was made from another" in error
    assert "dev.jsonl" in error
    assert (tmp_path / "out" / "report.html").read_bytes() == before


def test_settings_of_one_task_do_not_touch_the_others(ask, made, tiny_task, tmp_path):
    other = shutil.copytree(tiny_task, tmp_path / "other")
    given = f"[{','.join(SMALL)},other:data.train_limit=30]"
    assert main(["compare", *ask(task=f"{tiny_task},{other}", settings=given, arms="[scratch]", tries=1)]) == 0
    limits = {run.folder.parent.name: [s for s in run.settings if "train_limit" in s] for run in made}
    assert limits == {"other": ["data.train_limit=30"], tiny_task.name: []}
    assert "mean" in (tmp_path / "out" / "report.md").read_text()


# --- the report -----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.images, self.addresses, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag == "img":
            self.images.append(found)
        self.addresses += [found[name] for name in ("src", "href", "srcset") if found.get(name)]


def test_the_report_is_whole_and_needs_no_network(ask, made, tmp_path, capsys):
    assert main(["compare", *ask(tries=1)]) == 0
    out, text = tmp_path / "out", (tmp_path / "out" / "report.html").read_text()
    page, twin = Page(text), (out / "report.md").read_text()
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"<script|@import|https?://[^\s<]*\.(js|css)", text)
    assert len(page.images) == len(list((out / "plots").glob("*.png"))) == 2 + len(ARMS)
    assert all(len(image["alt"]) > 40 for image in page.images)
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles[0] == "Verdict"
    assert titles == re.findall(r"^## (.*)$", twin, re.MULTILINE)
    assert {"Score against FLOPs", "Scores", "What to decide by", "Cost", "Every pair", "Ablations", "Tuning",
            "Scores by label", "Calibration", "What only one arm gets right", "Commands"} <= set(titles)  # fmt: skip
    assert "What failed" not in titles
    assert "TLM is better than task only" in twin
    assert "With 2 seeds an arm all this is a first look" in twin
    shown = capsys.readouterr().out
    assert "Report: " in shown
    assert "pt-ft+tapt" in shown


def test_one_arm_alone_has_a_verdict(ask, made, tmp_path, capsys):
    assert main(["compare", *ask(arms="[scratch]", seeds=3, tries=1)]) == 0
    shown = capsys.readouterr().out
    assert "task only is alone, so there is nothing to compare" in " ".join(shown.split())
    assert "Picture" not in shown
    assert (tmp_path / "out" / "report.md").read_text().index("## Verdict") < 100


def test_the_report_renders_in_a_browser(ask, made, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no chromium here")
    assert main(["compare", *ask(arms="[tfidf,tlm,pt-ft]", tries=1, seeds=1)]) == 0
    page = tmp_path / "out" / "report.html"
    for width in (390, 1280):
        image = tmp_path / f"{width}.png"
        done = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
             f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={image}", f"--window-size={width},2400",
             page.as_uri()], capture_output=True, text=True, timeout=120)  # fmt: skip
        assert image.stat().st_size > 20_000
        assert "CONSOLE" not in done.stderr


# --- a whole comparison ---------------------------------------------------------------------------------------------


def test_a_whole_comparison(ask, tmp_path, tiny_task, jobs_here):
    keys = dict(arms="[tlm,pt-ft+tapt]", seeds=1, tries=1, checkpoints=1, pretraining=1, budget=1e9)
    assert main(["compare", *ask(**keys)]) == 0
    out = tmp_path / "out"
    (of_task,) = read(out / "summary.json")["tasks"].values()
    for arm, found in of_task.items():
        (run,) = found["runs"]
        predictions = [json.loads(line) for line in (Path(run) / "predictions.jsonl").read_text().splitlines()]
        labels = sorted({p["label"] for p in predictions})
        gold, said = ([labels.index(p[key]) for p in predictions] for key in ("label", "prediction"))
        assert found["test"][0]["macro_f1"] == pytest.approx(METRICS["macro_f1"](gold, said, 3)), arm
    total = of_task["tlm"]["cost"]["own"]["flops"] + of_task["pt-ft+tapt"]["cost"]["shared"]["flops"]
    assert total == pytest.approx(2e9, rel=0.3)  # lengths are estimated from words
    chain = [read(path)["init_from"] for path in sorted(out.rglob("summary.json")) if "init_from" in path.read_text()]
    starts = {Path(link["folder"]).parent.name for link in chain if link}
    assert {"trunk", "tapt-0"} < starts
    last = read(out / tiny_task.name / "pt-ft+tapt-0" / "summary.json")
    assert last["init_from"]["cost"]["flops"] > of_task["pt-ft+tapt"]["cost"]["shared"]["flops"]
    kl = read(out / tiny_task.name / "tlm-0" / "summary.json")["selection"]["kl"]
    where = (out / "report.md").read_text().partition("## Where the selected text came from")[2]
    row = re.search(rf"^\| TLM, {tiny_task.name} \|.*$", where, re.M)[0]
    assert row.split(" | ")[3] == f"{kl['to_random'] - kl['to_selection']:.3f}"


# --- figures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pretraining", "a_task", "tasks"),
    [(2.79e19, 2.74e18, 10), (1.54e21, 8.30e18, 186), (4.36e21, 7.59e19, 57)],
    ids=["TLM-S and BERT-B", "TLM-M and RoBERTa-B", "TLM-L and RoBERTa-L"],
)
def test_break_even_of_the_papers_figures(pretraining, a_task, tasks):
    assert round(break_even(pretraining, a_task)) == tasks


def test_break_even_is_where_both_ways_cost_the_same():
    tasks = break_even(1e15, 6e12, 1e12)
    assert 1e15 + tasks * 1e12 == pytest.approx(tasks * 6e12)
    assert break_even(1e15, 1e12, 2e12) == math.inf


def test_the_verdict_says_how_much_of_its_pretraining_the_rival_had_needed():
    def decision(flat):
        return Decision(
            arm="tlm", rival="pt-ft", task="t", flops=2e12, to_rival=1e12, ratio=100.0, rival_flops=1e14,
            rival_flat=flat, rival_to_arm=None, rival_ratio=None, rival_at_equal=None, score=0.7, rival_score=0.7,
            break_even=9.0, break_even_tuned=9.0,
        )  # fmt: skip

    assert ratio_sentence([decision(1e14)]).endswith("with 1/100 of the FLOPs.")
    both = ratio_sentence([decision(1e13), decision(4e13)])
    assert "on 2 of 2 tasks with 1/100 of the FLOPs (geometric mean). " in both
    assert "from 1/5 of its FLOPs on" in both
    assert both.endswith("TLM took 1/20 of these.")


def test_the_curve_is_read_by_the_logarithm_of_flops():
    curve = [Point(1e10, 0.4, 0.0), Point(1e12, 0.8, 0.0)]
    assert score_at(curve, 1e11) == pytest.approx(0.6)
    assert score_at(curve, 1e9) is None
    assert score_at(curve, 2e12) is None
    assert flops_to(curve, 0.6) == pytest.approx(1e11)
    assert flops_to(curve, 0.3) == 1e10
    assert flops_to(curve, 0.9) is None
    assert flat_from([Point(1e9, 0.5, 0), Point(1e10, 0.58, 0), Point(1e11, 0.6, 0.03)]) == 1e10
    assert flat_from([Point(1e9, 0.5, 0.2), Point(1e11, 0.6, 0)]) == 1e11
    assert flops_to([Point(1e9, 0.5, 0), Point(1e10, 0.4, 0), Point(1e11, 0.6, 0)], 0.5) == 1e9
    mean = mean_curve([curve, [Point(1e12, 0.2, 0.3), Point(1e14, 0.4, 0.3), Point(1e15, 1, 0)]])
    assert [p.flops for p in mean] == pytest.approx([1e11, 1e13])
    assert [p.score for p in mean] == pytest.approx([0.3, 0.6])
    assert mean[0].spread == pytest.approx(0.15)


def test_the_best_score_so_far_has_the_flops_of_its_step():
    records = [
        dict(kind="train", flops=10), dict(kind="dev", f=0.5), dict(kind="train", flops=20), dict(kind="dev", f=0.3),
        dict(kind="train", flops=30), dict(kind="dev", f=0.6),
    ]  # fmt: skip
    assert best_so_far(records, "f") == [(20, 0.5), (30, 0.5), (30, 0.6)]


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ("bert", "no such arm"),
        ("tlm:bm26", "neither key=value nor a selector"),
        ("scratch:random", "neither key=value nor a selector"),
        ("tfidf:seed=1", "nothing to change"),
        ("tlm:task=x", "alike for all arms"),
        ("tlm:data.train_limit=5", "alike for all arms"),
        ("tlm:finetune.steps=0", "follows from budget"),
        ("hf:nowhere", "no checkpoint"),
        ("tlm:joint.mlm_wait=1", "did you mean joint.mlm_weight"),
    ],
)
def test_an_arm_that_does_not_exist(arm, words, ask, capsys, tmp_path):
    assert main(["compare", *ask(arms=f"[{arm}]")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"budget": 1e5}, "too small, tlm on"),
        ({"budget": 1.5e8}, "in its tuning, which begins with 25% of it"),
        ({"arms": "[pt-ft]", "pretraining": 0.02, "tries": 1}, "its first checkpoint"),
        ({"arms": "[tlm,tlm]"}, "given twice"),
        ({"settings": "[seed=3]"}, "seed is not to be set here"),
        ({"settings": "[other:model=tiny]"}, "other is none of the tasks that can be named here"),
        ({"task": "nowhere"}, "nowhere"),
        ({"leaks": "keep"}, "use one of refuse, drop"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(keys, words, ask, capsys, tmp_path):
    keys = {"arms": "[tlm]"} | keys
    assert main(["compare", *ask(**keys)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_corpus_with_test_text_is_refused_with_the_count(ask, made, tiny_task, tiny_corpus, tmp_path, capsys):
    test = [json.loads(line)["text"] for line in (tiny_task / "test.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in tiny_corpus.read_text().splitlines()]
    rows += [{"id": f"x{i}", "text": text, "source": "leak"} for i, text in enumerate(test[:7])]
    corpus = write_jsonl(tmp_path / "leaky.jsonl", rows)
    assert main(["compare", *ask(corpus=corpus, leaks="refuse")]) == 2
    assert f"holds documents with dev or test text (7 of {tiny_task.name})" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["compare", *ask(corpus=corpus, leaks="drop", arms="[scratch]")]) == 0


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_comparisons_in_configs_are_well_formed(path):
    config = validate(load(CompareConfig, [str(path), "task=A,B", "corpus=C"]))
    assert [parse_arm(name).name for name in config.arms] == config.arms


def test_arms_are_told_apart_by_their_folders():
    slugs = [parse_arm(a).slug for a in ("tlm", "tlm:random", "tlm:joint.mlm_weight=0", "pt-ft", "pt-ft+tapt")]
    assert len(set(slugs)) == 5
    assert all(re.fullmatch(r"[\w.=+-]+", slug) for slug in slugs)
    assert replace(parse_arm("tlm:random"), name="x").settings == ("retrieval.selector=random",)
    assert compare.KINDS[0] == "tfidf"
