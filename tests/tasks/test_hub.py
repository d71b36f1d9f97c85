"""Collections of the hub, from local folders of their form: `datasets` opens them by the same call."""

import json

import pytest

from tasks import hub
from tasks.errors import InputError
from tasks.pool import open_pool
from tasks.prompts import read_prompt, render
from tlm.cli import main

FORM = {  # of each collection, where its YAML does not list tasks: configurations, and a record of each number
    "p3": (
        ["imdb_Movie_Expressed", "super_glue_rte_based_on", "wiki_bio_who"],
        lambda config, i: {
            "inputs": [i], "targets": [i], "inputs_pretokenized": f"{config} {i}?", "targets_pretokenized": "\nYes ",
            **({} if config == "wiki_bio_who" else {"answer_choices": ["No", "Yes"]}),
        },
    ),
    "bigbench": (
        ["riddles", "sums"],
        lambda config, i: {
            "idx": i, "inputs": f"Q: {i}\n  A:", "targets": [f"a{i}", "or"],
            "multiple_choice_targets": [f"b{i}", f"a{i}"] if config == "riddles" else [],
            "multiple_choice_scores": [0, 1] if config == "riddles" else [],
        },
    ),
    "flan": (None, lambda _, i: {"inputs": f"Is {i}?", "targets": str(i), "task": ["rte_10templates", "sums"][i % 2]}),
    "super_natural_instructions": (
        None,
        lambda _, i: {"task_name": f"task{i % 2}_x", "id": str(i), "definition": "Say it.", "inputs": f"{i}",
                      "targets": str(i)},
    ),
}  # fmt: skip


@pytest.fixture
def local(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(name, configs, record, splits=("train", "validation")):
        folder = tmp_path / hub.describe(name)["hf"]
        listed = []
        for config in configs or ["default"]:
            for split in splits:
                path = folder / config / f"{split}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                start = 0 if split == "train" else 40
                path.write_text("".join(json.dumps(record(config, i)) + "\n" for i in range(start, start + 40)))
            files = "".join(f"  - split: {s}\n    path: {config}/{s}.jsonl\n" for s in splits)
            listed.append(f"- config_name: {config}\n  data_files:\n{files}")
        (folder / "README.md").write_text("---\nconfigs:\n" + "".join(listed) + "---\n")

    return write


def test_each_collection_is_described_whole():
    assert set(FORM) | {"glue", "superglue"} == set(hub.names())
    for name in hub.names():
        about = hub.describe(name)
        for task in about.get("tasks", {"any": {}}).values():
            own = about | task
            assert {"hf", "source", "licence", "splits", "heldout", "category", "input", "prompts"} <= own.keys()
            assert all(read_prompt(prompt) for prompt in own["prompts"])
            assert ("choices" in own) != ("target" in own)
        own_categories = {own.get("category") for own in about.get("tasks", {}).values()}
        assert set(about["heldout"]) <= set(about.get("categories", {}).values()) | own_categories
    with pytest.raises(InputError, match="no such collection.*did you mean"):
        hub.describe("super_glue")


def test_a_pool_of_four_collections(local, tmp_path, capsys):
    for name, (configs, record) in FORM.items():
        local(name, configs, record)
    assert main(["pool", "build", f"out={tmp_path / 'pool'}", f"hub=[{','.join(FORM)}]"]) == 0
    pool = open_pool(str(tmp_path / "pool"))
    assert {name: (task.category, task.format) for name, task in pool.tasks.items()} == {
        "p3_imdb_Movie_Expressed": ("sentiment", "choice"),
        "p3_super_glue_rte_based_on": ("natural_language_inference", "choice"),
        "p3_wiki_bio_who": ("structure_to_text", "generate"),
        "bigbench_riddles": ("bigbench", "choice"),
        "bigbench_sums": ("bigbench", "generate"),
        "flan_rte_10templates": ("natural_language_inference", "generate"),
        "flan_sums": ("flan", "generate"),
        "super_natural_instructions_task0_x": ("super_natural_instructions", "generate"),
        "super_natural_instructions_task1_x": ("super_natural_instructions", "generate"),
    }
    assert pool.sides["heldout"] == ("natural_language_inference",)
    assert {task.family for task in pool.heldout} == {"p3/super_glue_rte", "flan/rte"}
    instances = list(pool.instances())
    assert len(instances) == 5 * 80 + 4 * 40
    assert all(i.target == "Yes" for i in instances if i.task == "p3_imdb_Movie_Expressed")
    first = next(i for i in instances if i.task == "super_natural_instructions_task0_x")
    prompt = pool.tasks[first.task].prompts[0]
    assert render(prompt, first.input, first.target, None).text == f"Say it.\n\n{first.target}\nOutput:"
    places = {i.choices.index(i.target) for i in instances if i.task == "bigbench_riddles"}
    assert places == {0, 1}


@pytest.mark.parametrize("name", ["glue", "superglue"])
def test_a_benchmark_of_listed_tasks(local, name):
    """Every column that a template names is there to be filled; a record without a label is left out."""
    tasks = hub.describe(name)["tasks"]
    texts = "sentence sentence1 sentence2 question question1 question2 premise hypothesis passage choice1 choice2 word"
    texts = f"{texts} paragraph answer query text span1_text span2_text".split()

    def record(config, i):
        label = -1 if i == 3 else i % len(tasks[config].get("choices", "ab"))
        return {text: f"{text} {i}" for text in texts} | {
            "label": label,
            "answers": [f"e{i}"],
            "entities": ["x", f"e{i}"],
        }

    local(name, list(tasks), record, ("train", "validation", "validation_matched"))
    found = {task.name: task for task in hub.read_collection(name)}
    assert found.keys() == {f"{name}_{task}" for task in tasks}
    assert all(len(task.rows) == (80 if task.name.endswith("record") else 79) for task in found.values())
    task = found["glue_mnli" if name == "glue" else "superglue_copa"]
    assert task.rows[1].target == ("neutral" if name == "glue" else "choice2 1")
    assert task.rows[0].input.startswith("premise 0\n")


def test_what_cannot_be_loaded_is_one_sentence(tmp_path, capsys, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        hub, "describe", lambda name: {"hf": "/no/such", "each": "x", "splits": ["train"], "heldout": []}
    )
    assert main(["pool", "build", f"out={tmp_path / 'pool'}", "hub=[p3]"]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "pool").exists()
