"""A pool's instances, checked once and kept in the cache: those of a task and split are found without reading others.

Reading the 416,000 instances of a pool through takes a minute on one core, opening the store a moment.

A store folder: instances.jsonl, offsets.npy int64[n + 1] into it, tasks.npy int32[n] (numbers of the pool's tasks),
splits.npy uint8[n] (of tasks.pool.SPLITS), inputs.npy uint64[n] (inputs up to spacing, case and punctuation), and
manifest.json.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from retrieval import folders
from tasks import files
from tasks.errors import InputError
from tasks.pool import SPLITS, Instance, Pool, fingerprint

KIND, VERSION = "instance store", 1


class Instances:
    """A store opened: `instances[row]` is an Instance; rows follow the pool's shards."""

    def __init__(self, folder: Path, pool: Pool):
        self.folder, self.pool = folder, pool
        self.lines = np.memmap(folder / "instances.jsonl", np.uint8, "r")
        names = ("offsets", "tasks", "splits", "inputs")
        self.offsets, self.tasks, self.splits, self.inputs = (np.load(folder / f"{name}.npy") for name in names)
        self.numbers = {name: number for number, name in enumerate(pool.tasks)}
        place = self.tasks.astype(np.int64) * len(SPLITS) + self.splits
        self.order = np.argsort(place, kind="stable")
        self.ends = np.searchsorted(place[self.order], np.arange(len(pool.tasks) * len(SPLITS)), side="right")

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, row: int) -> Instance:
        task, name, split, text, target, choices = json.loads(
            self.lines[self.offsets[row] : self.offsets[row + 1]].tobytes()
        )
        return Instance(task, name, split, text, target, None if choices is None else tuple(choices))

    def rows(self, task: str, split: str) -> np.ndarray:
        """int64, rising."""
        place = self.numbers[task] * len(SPLITS) + SPLITS.index(split)
        return self.order[self.ends[place - 1] if place else 0 : self.ends[place]]

    def training_rows(self, tasks: list[str], dropped: Counter) -> dict[str, np.ndarray]:
        """Of each task the train split, without instances whose input stands in a held-out task: these are counted in
        `dropped`. `Pool.training_instances` is the slow twin."""
        held = [self.numbers[task.name] for task in self.pool.heldout]
        barred = np.isin(self.inputs, self.inputs[np.isin(self.tasks, held)])
        found = {}
        for task in tasks:
            rows = self.rows(task, "train")
            found[task] = rows[~barred[rows]]
            if len(found[task]) < len(rows):
                dropped[task] = len(rows) - len(found[task])
        return found


def pool_sha256(pool: Pool) -> str:
    """Of all that lies in its files."""
    return folders.key(files=[files.sha256(path) for path in pool.files])


def open_instances(pool: Pool, sha256: str, cache: Path, progress: Callable[[int], None] | None = None) -> Instances:
    """The store of `pool`, whose files have that `pool_sha256`, made if it is not there. Raises InputError, before
    anything is written, for what is broken in a shard."""
    folder = cache / f"instances-{sha256}"
    folders.ensure(folder, KIND, VERSION, lambda new: write(new, pool, progress))
    return Instances(folder, pool)


def check(instance: Instance, pool: Pool) -> None:
    """Raises InputError for choices that a prompt of the task would say alike: no score could tell them apart."""
    for prompt in pool.tasks[instance.task].prompts if instance.choices else ():
        words = {prompt.answers.get(choice, choice) for choice in instance.choices}
        if len(words) < len(instance.choices):
            raise InputError(
                f"{pool.path}: {instance.id} ({instance.task}) has two choices that are said alike; give each its own "
                "words, or take the instance out"
            )


def write(folder: Path, pool: Pool, progress: Callable[[int], None] | None) -> dict:
    numbers = {name: number for number, name in enumerate(pool.tasks)}
    sizes, tasks, splits, inputs = [0], [], [], []
    with (folder / "instances.jsonl").open("wb") as file:
        for done, instance in enumerate(pool.instances(), 1):
            check(instance, pool)
            sizes.append(file.write(json.dumps(instance, ensure_ascii=False).encode() + b"\n"))
            tasks.append(numbers[instance.task])
            splits.append(SPLITS.index(instance.split))
            inputs.append(int.from_bytes(fingerprint(instance.input)[:8], "little"))
            if progress and done % 5_000 == 0:
                progress(done)
    np.save(folder / "offsets.npy", np.cumsum(sizes, dtype=np.int64))
    np.save(folder / "tasks.npy", np.array(tasks, np.int32))
    np.save(folder / "splits.npy", np.array(splits, np.uint8))
    np.save(folder / "inputs.npy", np.array(inputs, np.uint64))
    return {"instances": len(tasks)}
