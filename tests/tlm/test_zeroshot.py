"""Zero-shot scores: choices behind one prompt against each alone, generation against its slow twin, figures by hand."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch

from tasks.metrics import exact_match, rouge_l, token_f1
from tasks.pool import Instance, PoolTask
from tasks.prompts import Prompted
from tlm.cli import main
from tlm.generate import generate, generate_slowly
from tlm.model import ModelShape, Transformer
from tlm.tokenizer import SEP
from tlm.zeroshot import Case, Found, Run, each_alone, log_likelihoods, normalised, open_run, summary


def built(attention):
    """A model whose every answer differs: all weights moved from their start."""
    shape = ModelShape(60, 32, 2, 2, 40, 64, 1, attention=attention)
    model, noise = Transformer(shape, torch.Generator().manual_seed(0), "scaled"), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=noise)
    return model.eval()


@pytest.fixture(params=["prefix", "causal"])
def model(request):
    return built(request.param)


def cases():
    rng = np.random.default_rng(0)
    lengths = [(7, [2, 1, 5]), (3, [1, 1]), (19, [4]), (7, [3, 3, 3, 3]), (1, [6, 2])]
    return [Case(rng.integers(5, 60, n), [rng.integers(5, 60, a) for a in answers]) for n, answers in lengths]


def test_choices_behind_one_prompt_score_as_each_alone(model):
    for ours, theirs in zip(log_likelihoods(model, cases()), each_alone(model, cases()), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_likelihood_is_the_product_of_its_tokens(model):
    """A token at a time, each asked of the model as the next after a text that ends there."""
    from tlm.batches import pack

    case = cases()[0]
    for answer, found in zip(case.answers, log_likelihoods(model, [case])[0], strict=True):
        expected = 0.0
        for i, token in enumerate(answer):
            batch = pack([np.concatenate([case.prompt, answer[:i]])], answers=[(i,) if i else ()])
            expected += model.mlm_logits(model(batch)[-1:])[0].log_softmax(-1)[token].item()
        assert found == pytest.approx(expected, abs=1e-4)


def test_generation_equals_its_slow_twin(model):
    prompts = [case.prompt for case in cases()]
    fast, slow = generate(model, prompts, 12), generate_slowly(model, prompts, 12)
    assert [tokens.tolist() for tokens in fast] == [tokens.tolist() for tokens in slow]
    assert max(map(len, fast)) > 1
    layers = [layer.attn.attend.__name__ for layer in model.model.layers]
    assert layers == ["attend", "attend"]  # the memory is gone


def test_generation_ends_where_the_model_says_so():
    model = built("causal")
    with torch.no_grad():
        model.decoder.bias[SEP] = 100.0
    assert [tokens.tolist() for tokens in generate(model, [cases()[0].prompt], 12)] == [[]]


def test_an_answer_without_a_prompt_is_scored_once_for_all(general_run):
    run = open_run(str(general_run))
    tasks = ["theme", "theme", "unseen"]
    prompted = [Prompted(text, ("sport", "trade"), 0) for text in ("a", "b c", "d")]
    found = run.unconditional(run.cases(prompted, tasks), tasks)
    assert found[0].tolist() == found[1].tolist() != found[2].tolist()  # soft prompts: its own, and that of all tasks
    (alone,) = each_alone(run.model, [Case(run.reader.prompt(np.zeros(0, np.int64), 2, None),
                                           run.reader.answers(["sport", "trade"]))])  # fmt: skip
    np.testing.assert_allclose(found[2], alone, atol=1e-4)


@pytest.mark.parametrize(
    ("said", "wanted", "f1", "rouge"),
    [
        ("The cat sat", "the cat sat", 1, 1),
        ("sat cat the", "the cat sat", 1, 1 / 3),
        ("a b c d", "b d e", 2 * 2 / 7, 2 * 2 / 7),
        ("", "", 1, 1),
        ("", "x", 0, 0),
        ("[1, 2]", "[ 1 , 2 ]", 1, 1),
    ],
)
def test_measures_by_hand(said, wanted, f1, rouge):
    assert token_f1(said, wanted) == pytest.approx(f1)
    assert rouge_l(said, wanted) == pytest.approx(rouge)
    assert exact_match(said, wanted) == (f1 == rouge == 1)


def test_rouge_by_recursion():
    def longest(a, b):
        @functools.cache
        def of(i, j):
            if i == len(a) or j == len(b):
                return 0
            return 1 + of(i + 1, j + 1) if a[i] == b[j] else max(of(i + 1, j), of(i, j + 1))

        return of(0, 0)

    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = (rng.choice(list("abcd"), rng.integers(1, 9)).tolist() for _ in range(2))
        assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(2 * longest(a, b) / (len(a) + len(b)))


def task(name, category, family):
    return PoolTask(name, category, family, "choice", (), "", "", "", {})


def test_the_summary_by_hand():
    found = [Found(task("a", "x", "f")), Found(task("b", "x", "g")), Found(task("c", "y", "f"))]
    for of_task, rights, choices in zip(found, ([1, 1, 1, 0], [0, 0], [1, 0, 0]), (2, 4, 3), strict=True):
        for right in rights:
            of_task.add({"sum": float(right)}, 1 / choices)
    result = summary(found)
    expected = {"a": 0.5, "b": -1 / 3, "c": 0.0}
    for name, value in expected.items():
        assert result["by_task"][name]["sum"]["normalised"] == pytest.approx(value)
    assert result["by_category"]["x"]["sum"]["normalised"] == pytest.approx((0.5 - 1 / 3) / 2)
    assert result["by_family"]["f"]["sum"]["normalised"] == pytest.approx(0.25)
    everything = result["all"]["sum"]
    assert everything["normalised"] == pytest.approx(sum(expected.values()) / 3)
    assert everything["instances"] == 9
    assert everything["interval"][0] < everything["normalised"] < everything["interval"][1]
    assert result["by_task"]["b"]["sum"]["interval"] == pytest.approx([-1 / 3] * 2)  # all alike: nothing varies
    assert normalised(np.array([1.0]), np.array([1.0])) == 0  # a single choice says nothing


def asked(target, choices):
    return Instance("a", "a-0", "test", "", target, choices)


def test_saying_the_same_is_chance_where_labels_count_alike():
    from sklearn.metrics import balanced_accuracy_score

    rng = np.random.default_rng(0)
    labels = ["yes"] * 30 + ["no"] * 6 + ["maybe"] * 4
    for said in (["yes"] * 40, rng.choice(["yes", "no", "maybe"], 40).tolist()):
        of_task = Found(task("a", "x", "f"))
        for right, answer in zip(labels, said, strict=True):
            of_task.add({"sum": float(right == answer)}, 1 / 3, asked(right, ("no", "yes", "maybe")))
        of_task.balance()
        result = summary([of_task])["all"]["balanced"]
        expected = balanced_accuracy_score(labels, said, adjusted=True)
        assert result["normalised"] == pytest.approx(expected)
        assert result["interval"][0] <= expected <= result["interval"][1] <= 1
    for last in (asked("yes", ("yes", "nay")), None):  # other choices: nothing that all of them could be counted by
        of_task = Found(task("a", "x", "f"))
        of_task.add({"sum": 1.0}, 0.5, asked("no", ("no", "yes")))
        of_task.add({"sum": 1.0}, 0.5, last)
        of_task.balance()
        assert "balanced" not in of_task.values


def test_the_interval_of_one_task_is_that_of_a_binomial():
    of_task = Found(task("a", "x", "f"))
    for i in range(100):
        of_task.add({"sum": float(i < 60)}, 0.0)
    low, high = summary([of_task])["all"]["sum"]["interval"]
    assert (low, high) == (pytest.approx(0.6 - 1.96 * 0.049, abs=0.015), pytest.approx(0.6 + 1.96 * 0.049, abs=0.015))


def test_a_run_is_scored_on_what_it_never_saw(pretrained, pool_folder, pool_cache, capsys):
    settings = [f"pool={pool_folder}", f"cache={pool_cache}", "threads=1", "twin=6"]
    assert main(["eval", str(pretrained), *settings]) == 0
    assert "riddles" in capsys.readouterr().out
    result = json.loads((pretrained / "zeroshot.json").read_text())
    assert result["instances"] == 24
    assert result["by_task"].keys() == {"hidden", "spell"}
    assert result["all"]["sum"]["chance"] == pytest.approx(1 / 3)
    assert 0 <= result["all"]["rouge_l"]["mean"] <= 1
    assert result["twin"]["choices"] == 18
    assert result["twin"]["largest_difference"] < 1e-4
    assert main(["eval", str(pretrained), *settings, "limit=5", "by=generation"]) == 0
    again = json.loads((pretrained / "zeroshot.json").read_text())
    assert again["instances"] == 10
    assert "sum" not in again["all"]


def test_tasks_without_choices_are_not_scored_by_them(pretrained, pool_folder, pool_cache, tmp_path, capsys):
    settings = [f"cache={pool_cache}", "threads=1", "limit=2", "by=choices"]
    assert main(["eval", str(pretrained), f"pool={pool_folder}", *settings]) == 0
    assert "tasks without choices, which are left out: 1" in capsys.readouterr().err
    assert json.loads((pretrained / "zeroshot.json").read_text())["by_task"].keys() == {"hidden"}
    folder = shutil.copytree(pool_folder, tmp_path / "pool")  # where its category has no other task
    tasks = [json.loads(line) for line in (folder / "tasks.jsonl").read_text().splitlines()]
    for task in tasks:
        task["category"] = "spelling" if task["task"] == "spell" else task["category"]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    splits = json.loads((folder / "splits.json").read_text())
    (folder / "splits.json").write_text(json.dumps(splits | {"heldout_categories": ["riddles", "spelling"]}))
    assert main(["eval", str(pretrained), f"pool={folder}", "categories=[spelling]", *settings]) == 2
    assert "no task of spelling has choices" in capsys.readouterr().err


def test_what_it_saw_is_refused(pretrained, pool_folder, pool_cache, tmp_path, capsys):
    settings = [f"pool={pool_folder}", f"cache={pool_cache}", "threads=1", "limit=2"]
    assert main(["eval", str(pretrained), *settings, "categories=[topics,riddles]"]) == 2
    assert "trained on topics" in capsys.readouterr().err
    assert main(["eval", str(pretrained), *settings, "categories=[topics]", "seen=true"]) == 0
    other = shutil.copytree(pretrained, tmp_path / "other")
    (other / "model" / "pool.json").unlink()
    assert main(["eval", str(other), *settings]) == 2
    assert "was not trained on a pool" in capsys.readouterr().err
    assert main(["predict", str(pretrained)]) == 2
    assert "tlm eval" in capsys.readouterr().err


def test_every_instance_keeps_its_template(general_run, pool_folder):
    from tasks.pool import open_pool

    run, pool = open_run(str(general_run)), open_pool(str(pool_folder))
    assert isinstance(run, Run)
    found = [run.prompted(i, pool.tasks[i.task]).text for i in pool.instances([pool.tasks["theme"]], "test")]
    assert found == [run.prompted(i, pool.tasks[i.task]).text for i in pool.instances([pool.tasks["theme"]], "test")]
    assert len({text.split()[0] for text in found} & {"Possible", "Topic"}) == 2
