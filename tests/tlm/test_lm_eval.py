"""lm-eval, unchanged, on an exported causal run: its accuracy on a held-out task equals ours."""

import json

import pytest
from conftest import write_jsonl

from tasks.pool import open_pool
from tlm.cli import main
from tlm.zeroshot import open_run

YAML = """
task: hidden
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "[CLS] {{text}} [SEP]"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: " "
metric_list: [{metric: acc}]
"""


def test_its_accuracy_equals_ours(pretrained, pool_folder, pool_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    pool, run = open_pool(str(pool_folder)), open_run(str(pretrained))
    found = [run.prompted(i, pool.tasks["hidden"]) for i in pool.instances([pool.tasks["hidden"]], "test")]
    assert max(len(run.reader.encode([p.text])[0]) for p in found) < 40
    rows = [{"text": p.text, "choices": [f"{a} [SEP]" for a in p.answers], "gold": p.gold} for p in found]
    (tmp_path / "tasks").mkdir()
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "tasks" / "hidden.yaml").write_text(YAML.replace("FILE", str(path)))

    assert main(["export", str(pretrained), f"out={tmp_path / 'out'}"]) == 0
    model = HFLM(pretrained=str(tmp_path / "out"), device="cpu", dtype="float32", batch_size=4)
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    theirs = lm_eval.simple_evaluate(model, tasks=["hidden"], task_manager=manager, bootstrap_iters=0, log_samples=True)
    settings = [f"pool={pool_folder}", f"cache={pool_cache}", "threads=1", "by=auto"]
    assert main(["eval", str(pretrained), *settings]) == 0
    ours = json.loads((pretrained / "zeroshot.json").read_text())["by_task"]["hidden"]["sum"]
    assert theirs["results"]["hidden"]["acc,none"] == pytest.approx(ours["mean"])
    assert len(theirs["samples"]["hidden"]) == ours["instances"] == 12
