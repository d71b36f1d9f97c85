"""A pool of prompted tasks: a folder of `tasks.jsonl`, `splits.json` and shards of instances.

Categories are on one of two sides: those that train, and those held out, whose instances never train, not even where
they stand in a task that does. Instances are read as a stream, shard by shard, and each is checked.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from tasks import columns, files
from tasks.errors import InputError
from tasks.prompts import Prompt, read_prompt, version
from tasks.splits import text_key

SPLITS = ("train", "test")
FORMATS = ("choice", "generate")
SIDES = ("train", "heldout")  # each stands for all its categories where categories are named
_ENDINGS = (".jsonl.gz", ".jsonl.zst", ".jsonl")


@dataclass(frozen=True)
class PoolTask:
    name: str
    category: str
    family: str  # the group of sibling tasks
    format: str  # of FORMATS
    prompts: tuple[Prompt, ...]
    source: str
    licence: str
    shard: str
    stated: dict[str, int] = field(hash=False)  # split -> instances, where tasks.jsonl tells

    @cached_property
    def version(self) -> str:
        return version(self.prompts)


class Instance(NamedTuple):
    task: str
    id: str
    split: str
    input: str
    target: str
    choices: tuple[str, ...] | None


@dataclass(frozen=True)
class Pool:
    """tasks: by name, in the order of tasks.jsonl. sides: of SIDES -> its categories."""

    path: str
    tasks: dict[str, PoolTask]
    sides: dict[str, tuple[str, ...]]

    @cached_property
    def heldout(self) -> list[PoolTask]:
        return self.select(["heldout"])

    @property
    def files(self) -> list[str]:
        """Everything that it is made of."""
        shards = dict.fromkeys(task.shard for task in self.tasks.values())
        return [f"{self.path}/tasks.jsonl", f"{self.path}/splits.json", *(_shard_path(self.path, s) for s in shards)]

    def select(self, categories: Sequence[str]) -> list[PoolTask]:
        """The tasks of these categories; "train" and "heldout" name all of a side. Raises InputError for others."""
        wanted = set()
        known = [category for side in self.sides.values() for category in side]
        for category in categories:
            if category not in SIDES and category not in known:
                near = columns.nearest(category, [*SIDES, *known])
                raise InputError(f"{self.path}: no category {category!r}{near} (categories: {', '.join(known)})")
            wanted |= set(self.sides.get(category, [category]))
        return [task for task in self.tasks.values() if task.category in wanted]

    def instances(self, tasks: Iterable[PoolTask] | None = None, split: str | None = None) -> Iterator[Instance]:
        """Instances of `tasks` (all) and `split` (both), in the order of the shards.

        Raises InputError, naming file and line, for what is broken, and where a shard has not as many as tasks.jsonl
        tells: a file that was cut between two lines shows by nothing else.
        """
        wanted = self.tasks if tasks is None else {task.name for task in tasks}
        for shard in dict.fromkeys(self.tasks[name].shard for name in self.tasks if name in wanted):
            path, found = _shard_path(self.path, shard), Counter()
            for number, record in files.read_records(path):
                instance = self._instance(shard, f"{path}, line {number}", record)
                found[instance.task, instance.split] += 1
                if instance.task in wanted and split in (None, instance.split):
                    yield instance
            self._check_counts(shard, path, found)

    def training_instances(self, tasks: Sequence[PoolTask], dropped: Counter) -> Iterator[Instance]:
        """The train split of `tasks`, without instances whose input stands in a held-out task.

        Inputs are compared by splits.text_key. What is left out is counted by task in `dropped`. Raises InputError,
        before anything is read, if a task is held out.
        """
        refuse_heldout(self, tasks)
        barred = {fingerprint(instance.input) for instance in self.instances(self.heldout)} if self.heldout else set()
        for instance in self.instances(tasks, "train"):
            if fingerprint(instance.input) in barred:
                dropped[instance.task] += 1
            else:
                yield instance

    def _check_counts(self, shard: str, path: str, found: Counter) -> None:
        for task in self.tasks.values():
            for split, stated in task.stated.items() if task.shard == shard else ():
                if found[task.name, split] != stated:
                    raise InputError(
                        f"{path}: {found[task.name, split]} {split} instances of {task.name}, but tasks.jsonl tells "
                        f"of {stated}; the file was cut or changed, so fetch or build it again"
                    )

    def _instance(self, shard: str, where: str, record: dict) -> Instance:
        values = [record.get(name) for name in ("task", "id", "split", "input", "target")]
        for name, value in zip(("task", "id", "split", "input", "target"), values, strict=True):
            if not isinstance(value, str):
                raise InputError(f"{where}: {name!r} must be a text, not {str(value)[:40]!r}")
        task = self.tasks.get(record["task"])
        if task is None or task.shard != shard:
            raise InputError(f"{where}: tasks.jsonl has no task {record['task']!r} in this shard")
        if record["split"] not in SPLITS:
            raise InputError(f"{where}: split {record['split']!r}; use {' or '.join(SPLITS)}")
        choices = record.get("choices")
        if task.format == "generate":
            if choices is not None:
                raise InputError(f"{where}: choices, but {task.name} is a task of format generate")
            return Instance(*values, None)
        if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
            raise InputError(f"{where}: {task.name} is a task of format choice; a list of texts is wanted as choices")
        if record["target"] not in choices:
            raise InputError(f"{where}: the target {record['target'][:60]!r} is none of its choices")
        return Instance(*values, tuple(choices))


def open_pool(path: str, heldout: Sequence[str] | None = None) -> Pool:
    """Reads `tasks.jsonl` and `splits.json`, and no instance. `heldout`: categories held out instead of the pool's own.

    Raises InputError for what is missing or broken, a template that cannot work and a category without tasks.
    """
    path = path.rstrip("/")
    splits, tasks = files.read_object(f"{path}/splits.json"), {}
    for side in SIDES:
        names = splits.get(f"{side}_categories")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{path}/splits.json: '{side}_categories' must be a list of names")
    sides = {side: tuple(splits[f"{side}_categories"]) for side in SIDES}
    listed = [category for names in sides.values() for category in names]
    if twice := sorted(category for category, count in Counter(listed).items() if count > 1):
        raise InputError(f"{path}/splits.json: the category {twice[0]!r} is named twice")
    for number, record in files.read_records(f"{path}/tasks.jsonl"):
        task = _task(f"{path}/tasks.jsonl, line {number}", record)
        if task.name in tasks:
            raise InputError(f"{path}/tasks.jsonl, line {number}: the task {task.name!r} stands there twice")
        if task.category not in listed:
            raise InputError(
                f"{path}/tasks.jsonl, line {number}: splits.json does not name the category {task.category!r}"
            )
        tasks[task.name] = task
    if empty := sorted(set(listed) - {task.category for task in tasks.values()}):
        raise InputError(f"{path}/splits.json: the category {empty[0]!r} has no task; take it out")
    pool = Pool(path, tasks, sides)
    if heldout is None:
        return pool
    held = {task.category for task in pool.select(heldout)}
    order = (tuple(c for c in listed if c not in held), tuple(c for c in listed if c in held))
    return Pool(path, tasks, dict(zip(SIDES, order, strict=True)))


def refuse_heldout(pool: Pool, tasks: Iterable[PoolTask]) -> None:
    """Raises InputError, with the names, if a task is of a held-out category."""
    held: dict[str, list[str]] = {}
    for task in tasks:
        if task.category in pool.sides["heldout"]:
            held.setdefault(task.category, []).append(task.name)
    if held:
        named = "; ".join(f"{category} ({_some(names)})" for category, names in held.items())
        raise InputError(f"{pool.path}: held-out categories never train: {named}; leave them out")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _task(where: str, record: dict) -> PoolTask:
    for name in ("task", "category", "format", "shard"):
        if not isinstance(record.get(name), str) or not record[name]:
            raise InputError(f"{where}: {name!r} must be a text, not {str(record.get(name))[:40]!r}")
    if record["format"] not in FORMATS:
        raise InputError(f"{where}: format {record['format']!r}; use {' or '.join(FORMATS)}")
    if not isinstance(record.get("prompts"), list) or not record["prompts"]:
        raise InputError(f"{where}: 'prompts' must be a list of at least one template")
    prompts = []
    for number, value in enumerate(record["prompts"], 1):
        try:
            prompts.append(read_prompt(value))
        except InputError as error:
            raise InputError(f"{where}, prompt {number}: {error}") from error
        if record["format"] == "generate" and prompts[-1].lists_choices:
            raise InputError(f"{where}, prompt {number}: it lists choices, and a task of format generate has none")
    return PoolTask(
        name=record["task"],
        category=record["category"],
        family=record.get("family") or record["task"],
        format=record["format"],
        prompts=tuple(prompts),
        source=record.get("source", ""),
        licence=record.get("licence", ""),
        shard=record["shard"],
        stated={split: record[f"n_{split}"] for split in SPLITS if f"n_{split}" in record},
    )


def _shard_path(folder: str, shard: str) -> str:
    for path in (f"{folder}/{shard}{ending}" for ending in _ENDINGS):
        if files.exists(path):
            return path
    raise InputError(f"{folder}/{shard}{_ENDINGS[0]}: no such file, but tasks.jsonl names this shard")


def fingerprint(text: str) -> bytes:
    """128 bits that stand for a text up to spacing, case and punctuation: a few megabytes for a whole pool."""
    return hashlib.blake2b(text_key(text).encode(), digest_size=16).digest()
