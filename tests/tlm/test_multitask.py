"""`tlm pretrain`: what a model is shown, whole runs on a tiny pool, and what is refused."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import PRETRAIN, pretrain, write_jsonl
from safetensors.torch import load_file

from tasks.pool import open_pool
from tasks.prompts import Prompt, Prompted
from tlm import multitask, trainer
from tlm.batches import IGNORE
from tlm.cli import main
from tlm.instances import open_instances, pool_sha256
from tlm.mixture import EXTERNAL, TASK, MicroBatch
from tlm.model import ModelShape, Transformer
from tlm.objectives import Source
from tlm.prompted import Number, PromptedObjective, PromptMixture, PromptSource, Reader, variants
from tlm.task_mixture import TaskMixture
from tlm.tokenizer import CLS, SEP, train_tokenizer


@pytest.fixture(scope="session")
def instances(pool_folder, pool_cache):
    pool = open_pool(str(pool_folder))
    return open_instances(pool, pool_sha256(pool), pool_cache)


@pytest.fixture(scope="session")
def reader(real_text):
    return Reader(train_tokenizer(real_text[:200], 320), 24)


def losses(run):
    clocks = ("seconds", "tokens_per_second", "mfu")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines]


# What a model is shown


def test_the_store_holds_what_the_pool_does(pool_folder, instances):
    pool, slow, fast = open_pool(str(pool_folder)), Counter(), Counter()
    assert [instances[row] for row in range(len(instances))] == list(pool.instances())
    tasks = pool.select(["train"])
    rows = instances.training_rows([task.name for task in tasks], fast)
    kept = [instances[row] for row in sorted(np.concatenate(list(rows.values())))]
    assert kept == list(pool.training_instances(tasks, slow))
    assert fast == slow == {"first": 1}


def test_an_example_is_prompt_and_answer(reader):
    text, answer = reader.encode(["the value of a name", "an object"])
    example = reader.example(Prompted("the value of a name", ("no", "an object"), 1), None)
    assert example.inputs.tolist() == [CLS, *text, SEP, *answer]
    assert example.answer == len(answer)
    asked = np.flatnonzero(example.targets != IGNORE)
    assert asked.tolist() == list(range(len(text) + 1, len(example.inputs)))
    assert example.targets[asked].tolist() == [*answer, SEP]


def test_what_is_too_long_loses_the_prompts_beginning_and_half_the_window_of_answer(reader):
    long = "the value of a name is an object " * 9
    (tokens,) = reader.encode([long])
    example = reader.example(Prompted(long, (long,), 0), None)
    assert len(example.inputs) == 24
    assert example.targets[-12:].tolist() == tokens[:12].tolist()  # without the [SEP] that would end it
    assert example.inputs[:13].tolist() == [CLS, *tokens[-11:], SEP]


def test_soft_prompts_are_the_tasks_own_or_those_of_all(reader):
    soft = replace(reader, soft=3, slots={"a": 1, "b": 2})
    size = reader.tokenizer.get_vocab_size()
    for task, first in (("a", 3), ("b", 6), (None, 0), ("unseen", 0)):
        inputs = soft.example(Prompted("the value", ("a name",), 0), task).inputs
        assert inputs[:4].tolist() == [CLS, size + first, size + first + 1, size + first + 2]
    model = Transformer(ModelShape(size, 16, 1, 2, 16, 24, 1, attention="prefix", soft=9), torch.Generator(), "scaled")
    objective = PromptedObjective(PromptSource(None, {}, soft, np.array([1]), np.array([1])))
    example = soft.example(Prompted("the value", ("a name",), 0), "b")
    with mock.patch.object(PromptSource, "example", return_value=example):
        (part,) = objective.step([MicroBatch(TASK, np.array([0]), np.array([0]))])
    objective.losses(model)(part.batch, False, True)[1].backward()
    touched = model.model.embeddings.soft.weight.grad.abs().sum(1).nonzero().flatten()
    assert touched.tolist() == [6, 7, 8]
    with torch.no_grad():  # a vector of the vocabulary in its place gives the same
        model.model.embeddings.soft.weight[6:9] = model.model.embeddings.tok_embeddings.weight[[7, 8, 9]]
        plain = replace(part.batch, tokens=torch.where(part.batch.tokens >= size, part.batch.tokens - size + 1, 0) +
                        torch.where(part.batch.tokens >= size, 0, part.batch.tokens))  # fmt: skip
        torch.testing.assert_close(model(part.batch), model(plain))


def test_prompts_of_a_task_list_its_choices_or_not(pool_folder):
    tasks = open_pool(str(pool_folder)).tasks
    front = "Possible answers:\n{{ choices }}\n\n"
    assert variants(tasks["theme"], "unlisted") == (Prompt("{input}\nWhat is it about?"),)
    assert [p.template for p in variants(tasks["theme"], "both")] == [
        "{input}\nWhat is it about?", f"{front}{{{{ input }}}}\nWhat is it about?", "Topic of: {input}\n{choices}",
    ]  # fmt: skip
    assert len(variants(tasks["theme"], "listed")) == 2
    assert len(variants(tasks["theme"], "both", most=1)) == 2
    assert len(variants(tasks["first"], "listed")) == 1  # there is nothing to list


def test_draws_are_of_their_task_and_nothing_else_decides_them(instances):
    rows = instances.training_rows(["theme", "first"], Counter())
    tasks = TaskMixture(4, ("theme", "first"), (26, 25), (3, 1), (3, 1), batch=1)
    mixture = PromptMixture(4, {TASK: 9}, {TASK: 8}, 0, tasks=tasks, rows=tuple(rows.values()))
    drawn = [number for step in range(8) for micro in mixture.draw(step) for number in micro.examples]
    again = [number for step in range(7, -1, -1) for micro in mixture.draw(step) for number in micro.examples[::-1]]
    assert drawn == again[::-1]
    numbers = [Number.of(number) for number in drawn]
    assert Counter(instances[n.row].task for n in numbers) == {"theme": 48, "first": 16}
    assert {n.template for n in numbers if instances[n.row].task == "theme"} == {0, 1, 2}
    assert 0 < sum(not n.own for n in numbers) < 20
    for n in numbers[:5]:
        assert Number.of(Number.join(n.row, n.template, n.own)) == n


def test_the_loss_is_a_mean_over_answers_however_a_step_is_cut(instances, real_text):
    reader = Reader(train_tokenizer(real_text[:200], 320), 48)
    tasks = instances.pool.select(["train"])
    prompts = {task.name: variants(task, "both") for task in tasks}
    source = PromptSource(instances, prompts, reader, np.array([20]), np.array([3]))
    external = Source(lambda i: np.arange(5, 15 + i), np.array([10, 11, 12]))
    objective = PromptedObjective(source, external)
    rows = [*instances.rows("theme", "train")[:4], *instances.rows("first", "train")[:3]]
    numbers = Number.join(np.array(rows), np.zeros(7, np.int64), np.ones(7, np.int64))
    micros = [MicroBatch(TASK, numbers, np.arange(7)), MicroBatch(EXTERNAL, np.arange(3), np.arange(3))]
    model = Transformer(ModelShape(320, 16, 1, 2, 16, 48, 1, attention="prefix"), torch.Generator().manual_seed(0))
    losses = objective.losses(model)

    def total(parts):
        return sum(w.mlm * losses(w.batch, True, False)[0] if w.mlm else w.task * losses(w.batch, False, True)[1]
                   for w in parts)  # fmt: skip

    expected = []
    for source_name, group in ((TASK, numbers), (EXTERNAL, range(3))):
        terms = []
        for number in group:
            example = objective.example(source_name, number)
            (part,) = objective.step([MicroBatch(source_name, np.array([number]), np.array([0]))])
            states = model(part.batch)
            log_p = model.mlm_logits(states).log_softmax(-1)
            at = np.flatnonzero(example.targets != IGNORE)
            terms += [-log_p[i, example.targets[i]] for i in at]
        expected.append(torch.stack(terms).mean())
    torch.testing.assert_close(total(objective.step(micros)), sum(expected) / 2)
    cut = [part for rank in range(2) for part in objective.step(micros, rank, 2, most_tokens=40)]
    assert len(cut) > 4
    torch.testing.assert_close(total(cut), sum(expected) / 2)


# Whole runs


def test_a_run_leaves_what_the_design_says(pretrained):
    summary = json.loads((pretrained / "summary.json").read_text())
    for name in ("config.yaml", "env.json", "inputs.json", "ckpt/latest", "model/tokenizer.json", "model/cost.json"):
        assert (pretrained / name).exists(), name
    shown = json.loads((pretrained / "model" / "pool.json").read_text())
    assert shown["seen"] == {"theme": "topics", "first": "topics", "even": "numbers"}
    assert summary["data"]["train_examples"] == 3 * 26 - 1
    assert summary["data"]["dropped_as_heldout"] == 1
    lines = losses(pretrained)
    train = [line["task_loss"] for line in lines if line["kind"] == "train"]
    assert train[-1] < train[0] - 0.5
    assert [line["step"] for line in lines if line["kind"] == "dev"] == [12, 24]
    assert summary["cost"]["flops"] > 0


def test_the_report_shows_it(pretrained, tmp_path):
    assert main(["report", str(pretrained), f"out={tmp_path / 'report.html'}"]) == 0
    assert "Scores on tiny_pool" in (tmp_path / "report.html").read_text()


def test_a_run_that_was_stopped_ends_the_same_to_the_bit(pretrained, pool_folder, pool_cache, tmp_path):
    log = trainer.Loop.log

    def stop(loop, *arguments):
        if loop.stage.step == 20:
            raise KeyboardInterrupt
        log(loop, *arguments)

    with mock.patch.object(trainer.Loop, "log", stop):
        assert pretrain(pool_folder, pool_cache, tmp_path, "run=again", "attention=causal") == 130
    assert pretrain(pool_folder, pool_cache, tmp_path, "run=again", "attention=causal") == 0
    assert losses(tmp_path / "again") == losses(pretrained)
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (tmp_path / "again", pretrained))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_general_text_is_learnt_beside_the_pool(general_run):
    summary = json.loads((general_run / "summary.json").read_text())
    assert summary["arm"] == "general-tlm"
    assert summary["data"]["external_documents"] > 20
    assert {part["task"] for part in summary["selection"]["tasks"]} == {"theme", "first", "even"}
    assert summary["data"]["train_examples"] == 60
    train = [line for line in losses(general_run) if line["kind"] == "train"]
    assert all(line["mlm_loss"] and line["task_loss"] for line in train)
    assert 0.7e9 < summary["cost"]["flops"] < 2.6e9
    weights = load_file(general_run / "model" / "model.safetensors")
    assert weights["model.embeddings.soft.weight"].shape == (2 * 4, 32)


def test_many_tasks_query_by_category(instances):
    tasks = instances.pool.select(["train"])
    rows = instances.training_rows([task.name for task in tasks], Counter())
    each, quota = multitask.as_tasks(instances, tasks, rows, 4)
    assert ([task.name for task in each], quota) == (["theme", "first", "even"], [1, 1, 1])
    with mock.patch.object(multitask, "MOST_QUERYING", 2):
        both, quota = multitask.as_tasks(instances, tasks, rows, 4)
    assert ([task.name for task in both], quota) == (["topics", "numbers"], [2, 1])
    assert len(both[0].splits["train"]) == 8
    unseen = {text for task in both for split in ("dev", "test") for text in task.texts(split)}
    assert unseen == {i.input for i in instances.pool.instances() if i.split == "test" or i.task in ("hidden", "spell")}


def test_a_task_model_starts_from_it(general_run, tiny_task, pool_cache, tmp_path):
    own = [setting for setting in PRETRAIN if not setting.startswith(("joint.dev", "joint.steps", "joint.eval"))]
    more = ["joint.steps=0", "joint.eval_every=0", "finetune.steps=2", "finetune.eval_every=0", "run=from"]
    names = [f"task={tiny_task}", f"init_from={general_run}/model", f"cache={pool_cache}", f"out={tmp_path}"]
    assert main(["train", *names, *own, *more, "finetune.lr=0", "finetune.matrix_lr=0"]) == 0
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (tmp_path / "from", general_run))
    shared = [name for name in theirs if not name.startswith(("head.", "classifier.", "model.embeddings.soft"))]
    assert all(torch.equal(ours[name], theirs[name]) for name in shared)
    assert "model.embeddings.soft.weight" not in ours


# What is refused: one sentence, and no run folder


def changed(folder, tmp_path, edit):
    copy = shutil.copytree(folder, tmp_path / "pool")
    for name in ("tasks", "one"):
        path = copy / f"{name}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        edit(name, lines)
        write_jsonl(path, lines)
    return copy


def unknown_field(name, lines):
    if name == "tasks":
        lines[0]["prompts"] = ["{input} {label}"]


def reaching(name, lines):
    if name == "tasks":
        lines[0]["prompts"] = ["{{ input.__class__.__mro__ }}"]


def outside(name, lines):
    if name == "one":
        lines[3]["target"] = "none"


def alike(name, lines):
    if name == "tasks":
        lines[2]["prompts"] = [{"template": "{input}", "answers": {"yes": "it is", "no": "it is"}}]


def cut_in_the_middle(name, lines):
    if name == "one":
        del lines[40:]


def no_training(name, lines):
    if name == "tasks":
        lines[2]["n_train"] = 0
    else:
        lines[:] = [line for line in lines if (line["task"], line["split"]) != ("even", "train")]


def long_answer(name, lines):
    if name == "one":
        lines[38]["target"] = "and on " * 30


def nothing(name, lines):
    pass


CASES = {
    "an unknown field": (unknown_field, [], ["label", "tasks.jsonl", "line 1"]),
    "reaching beyond its data": (reaching, [], ["__class__", "line 1"]),
    "a target outside its choices": (outside, [], ["line 4", "none of its choices"]),
    "choices said alike": (alike, [], ["even-0", "alike"]),
    "a file cut in the middle": (cut_in_the_middle, [], ["one.jsonl", "first"]),
    "a category without training instances": (no_training, [], ["numbers", "pool.categories"]),
    "a held-out category": (nothing, ["pool.categories=[topics,riddles]"], ["riddles", "never train"]),
    "an unknown category": (nothing, ["pool.categories=[topic]"], ["topics"]),
    "no category": (nothing, ["pool.categories=[]"], ["pool.categories=[]"]),
    "more tasks than there are": (nothing, ["pool.tasks=9"], ["3 tasks"]),
    "long answers": (
        long_answer,
        ["pool.long_answers=refuse"],
        ["first-0", "24 tokens", "half the window", "pool.long_answers=cut"],
    ),
    "no room beside soft prompts": (nothing, ["pool.soft=30"], ["pool.soft=30", "model.max_length"]),
    "too few families": (nothing, ["pool.family_share=0.1"], ["family_share"]),
    "another attention": (nothing, ["attention=both"], ["attention", "prefix"]),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, pool_folder, pool_cache, tmp_path, capsys):
    edit, settings, words = CASES[name]
    folder = pool_folder if edit is nothing else changed(pool_folder, tmp_path, edit)
    assert pretrain(folder, pool_cache, tmp_path / "out", "run=bad", *settings) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    for word in words:
        assert word in said
    assert not (tmp_path / "out" / "bad").exists()


def test_a_pool_is_asked_for(capsys):
    assert main(["pretrain"]) == 2
    assert "pool=: missing" in capsys.readouterr().err
