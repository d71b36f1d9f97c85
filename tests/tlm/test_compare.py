"""`tlm compare` on the tiny task: whole comparisons with runs in this process, its rules, and what is refused."""

import json
import math
import shutil

import numpy as np
import pytest

from conftest import write_jsonl
from tlm import compare, versus
from tlm.benches import recipe
from tlm.cli import main
from tlm.compare import parse_arm
from tlm.config import CompareConfig, load, validate
from tlm.statistics import holm
from tlm.versus import Point, best_so_far, break_even, flops_to, mean_curve, score_at

SMALL = [
    "model.hidden=32", "model.layers=2", "model.heads=2", "model.intermediate=48", "model.max_length=32",
    "tokenizer.vocabulary=400", "retrieval.k=20", "joint.batch=8", "finetune.batch=8", "init=random",
]  # fmt: skip
ARMS = ["tfidf", "scratch", "tlm", "tlm:finetune.steps=0", "pt-ft", "pt-ft+tapt"]


class Done:
    """A run that was made in this process, in the place of one that another makes."""

    made: list[str] = []  # noqa: RUF012
    fails: str | None = None

    def __init__(self, run):
        type(self).made.append(str(run.folder))
        if self.fails and self.fails in str(run.folder):
            recipe.log_of(run).parent.mkdir(parents=True, exist_ok=True)
            recipe.log_of(run).write_text("tlm: the disk is full\n")
            self.status = 2
        else:
            self.status = main(["train", *run.settings])

    def poll(self):
        return self.status

    @property
    def returncode(self):
        return self.status


@pytest.fixture(scope="module", autouse=True)
def here():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "start", Done)
        patch.setattr(recipe, "POLL_SECONDS", 0)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def arguments(tiny_task, tiny_corpus, folder):
    other = shutil.copytree(tiny_task, folder / "other")
    return [
        "compare", f"task={tiny_task},{other}", f"corpus={tiny_corpus}", f"arms=[{','.join(ARMS)}]", "seeds=2",
        f"settings=[{','.join(SMALL)}]", "budget=2e9", "finetune_share=0.2", "pretraining=2", "checkpoints=2", "tries=2",
        "leaks=drop", f"out={folder}/out", f"cache={folder}/cache", "price_per_hour=10",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(arguments, folder):
    Done.made.clear()
    assert main(arguments) == 0
    return folder / "out", list(Done.made)


def read(path):
    return json.loads(path.read_text())


def test_all(finished):
    print(len(finished[1]), "\n".join(finished[1]))
