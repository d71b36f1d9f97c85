"""`task=none`: masked LM on the whole corpus, kept along the way; and runs that start from what was kept."""

import json

import numpy as np
import pytest
import torch
from conftest import write_jsonl

from tlm.cli import main
from tlm.config import TrainConfig, load, validate
from tlm.ledger import Ledger, add_costs
from tlm.mixture import EXTERNAL, Mixture
from tlm.model import load_model
from tlm.prepare import open_corpus, whole_corpus
from tlm.progress import Progress

SMALL = [
    "model.hidden=32", "model.layers=2", "model.heads=2", "model.intermediate=48", "model.max_length=32",
    "tokenizer.vocabulary=400", "joint.batch=8", "finetune.batch=8", "finetune.eval_every=10", "threads=1", "boards=[]",
    "checkpoint_seconds=0",
]  # fmt: skip
QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pretraining")


def train(folder, name, *settings):
    status = main(["train", *SMALL, f"out={folder}", f"cache={folder}/cache", f"run={name}", *settings])
    return status, folder / name


@pytest.fixture(scope="module")
def pretrained(folder, tiny_corpus, tiny_task):
    status, run = train(
        folder, "trunk", "task=none", f"corpus={tiny_corpus}", f"unseen=[{tiny_task}]", "joint.steps=30",
        "joint.keep_at=[10,30]",
    )  # fmt: skip
    assert status == 0
    return run


def read(path):
    return json.loads(path.read_text())


def test_it_learns_masked_words_and_keeps_what_it_is_told_to(pretrained):
    summary = read(pretrained / "summary.json")
    assert (summary["arm"], summary["dev"], summary["test"]) == ("pretraining", None, None)
    assert summary["data"]["train_examples"] == 0
    losses = [json.loads(line)["mlm_loss"] for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    first, last = (read(pretrained / f"at-0000{step}" / "cost.json") for step in (10, 30))
    assert 0 < first["flops"] < last["flops"] == summary["cost"]["flops"]
    same = [load_model(pretrained / name).state_dict() for name in ("at-000030", "model")]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])


def test_finetuning_starts_from_it_and_tells_what_it_has_cost(pretrained, folder, tiny_task):
    start = pretrained / "at-000010"
    status, run = train(folder, "finetuned", f"task={tiny_task}", f"init_from={start}", "joint.steps=0",
                        "finetune.steps=0")  # fmt: skip
    assert status == 0
    old, new = (load_model(path).state_dict() for path in (start, run / "model"))
    kept = [name for name in old if not name.startswith(("head.", "classifier."))]
    assert all(torch.equal(old[name], new[name]) for name in kept)  # no step was taken
    assert new["classifier.weight"].shape[0] == 3
    summary = read(run / "summary.json")
    assert summary["arm"] == "pt-ft"
    assert summary["init_from"]["cost"] == read(start / "cost.json")
    assert summary["cost"]["flops"] == 0
    assert (run / "model" / "tokenizer.json").read_text() == (start / "tokenizer.json").read_text()


def test_costs_add_up_along_a_chain(pretrained, folder, tiny_corpus):
    _, run = train(folder, "cooled", "task=none", f"corpus={tiny_corpus}", f"init_from={pretrained}/at-000010",
                   "joint.steps=5", "joint.schedule=linear")  # fmt: skip
    own, all_of_it = read(run / "summary.json")["cost"], read(run / "model" / "cost.json")
    assert all_of_it["flops"] == own["flops"] + read(pretrained / "at-000010" / "cost.json")["flops"]
    assert all_of_it["seconds"].keys() >= {"joint", "tokenizing"}


def test_a_killed_pretraining_keeps_the_same_model(pretrained, folder, tiny_corpus, tiny_task, monkeypatch):
    from tlm import trainer

    settings = [
        "task=none",
        f"corpus={tiny_corpus}",
        f"unseen=[{tiny_task}]",
        "joint.steps=30",
        "joint.keep_at=[10,30]",
    ]
    keep = trainer.Loop.keep_model

    def die(loop):
        keep(loop)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Loop, "keep_model", die)
    assert train(folder, "killed", *settings)[0] == 130
    monkeypatch.undo()
    assert train(folder, "killed", *settings)[0] == 0
    one, other = (load_model(folder / name / "model").state_dict() for name in ("trunk", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_documents_with_test_text_of_any_unseen_task_are_left_out(tiny_task, tmp_path):
    test = [json.loads(line)["text"] for line in (tiny_task / "test.jsonl").read_text().splitlines()]
    rows = [
        {"id": str(i), "text": text} for i, text in enumerate(["a plain text of no task " * 5, *test[:3], "b " * 30])
    ]
    path = write_jsonl(tmp_path / "corpus.jsonl", rows)
    config = validate(load(TrainConfig, ["task=none", f"corpus={path}", f"unseen=[{tiny_task}]"]))
    corpus = open_corpus(str(path), tmp_path, Ledger(), QUIET)
    whole = whole_corpus(corpus, config, tmp_path, QUIET)
    assert whole.leaks.tolist() == [1, 2, 3]
    assert list(whole.texts()) == [rows[0]["text"], rows[4]["text"]]
    assert whole.manifest["words"] == sum(len(text.split()) for text in whole.texts())
    seen = whole_corpus(corpus, validate(load(TrainConfig, ["task=none"])), tmp_path, QUIET)
    assert len(seen) == 5
    assert seen.fingerprint != whole.fingerprint


def test_without_a_task_every_batch_is_external():
    mixture = Mixture(0, {EXTERNAL: 10}, {EXTERNAL: 4}, 3, ramp_steps=2)
    drawn = [mixture.draw(step) for step in range(8)]
    assert all(micro.source == EXTERNAL for draw in drawn for micro in draw)
    seen = np.concatenate([draw[0].examples for draw in drawn])
    assert sorted(seen[:10]) == list(range(10))


def test_costs_are_added():
    ones = [Ledger(flops=n, tokens=2, joint_tokens=1, seconds={"joint": n, str(n): 1.0}).cost(10, 3600) for n in (1, 2)]
    both = add_costs(ones)
    assert (both["flops"], both["tokens"], both["flops_paper"]) == (3, 4, 120)
    assert both["seconds"] == {"joint": 3, "1": 1, "2": 1}
    assert both["money"] == 5
    assert both["peak_rss_bytes"] == max(one["peak_rss_bytes"] for one in ones)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["task=none"], "leaves nothing to learn"),
        (["task={task}", "init_from=nowhere"], "nowhere/tokenizer.json"),
        (["task={task}", "init_from={start}", "model.hidden=64"], "is of another shape"),
    ],
)
def test_what_cannot_be_started_is_one_sentence(pretrained, folder, tiny_task, settings, words, capsys):
    settings = [s.format(task=tiny_task, start=pretrained / "at-000010") for s in settings]
    status, run = train(folder, "refused", *settings)
    assert (status, run.exists()) == (2, False)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("tlm: ")
    assert words in error


def test_a_pretraining_is_no_classifier(pretrained, tmp_path, capsys):
    for command in (["predict", str(pretrained), "-"], ["export", str(pretrained), f"out={tmp_path}/out"]):
        assert main(command) == 2
        assert "knows no labels" in capsys.readouterr().err
