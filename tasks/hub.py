"""Collections of tasks on the Hugging Face hub, brought to the form of a pool by `datasets`; one YAML a collection.

A collection's tasks are its configurations, or, of one table, what a column tells apart (`each`), or are listed, each
with its template, choices and prompts (`tasks`). Rows are streamed, and of a task no more than ENOUGH are read, so that
a collection of hundreds of millions of rows is not fetched whole; a table that a column divides is read to its end.
The columns are those that the collections had when this was written, without a network to see them.
"""

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tasks.columns import nearest
from tasks.errors import InputError
from tasks.pool_sources import Found, Row
from tasks.prompts import fill
from tasks.sources import hub_library, unloaded

FOLDER = Path(__file__).parent / "collections"
ENOUGH = 600  # rows of a task and split: pool_sources.MOST, and some for repeats and texts too long
NETWORK = "is there a network?"  # the names are ours


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def describe(name: str) -> dict:
    """Raises InputError for an unknown name."""
    from omegaconf import OmegaConf

    if name not in names():
        raise InputError(f"hub={name}: no such collection{nearest(name, names())} (there are {', '.join(names())})")
    return OmegaConf.to_container(OmegaConf.load(FOLDER / f"{name}.yaml"))


def read_collection(name: str) -> Iterator[Found]:
    """Its tasks, as pool_sources reads those of packages. Raises InputError where `datasets` cannot load it."""
    about = describe(name)
    if "tasks" in about:
        for task, own in about["tasks"].items():
            yield found(name, task, about | own, rows_of_task(about | own, task))
    elif about["each"] == "configuration":
        for task in configurations(about["hf"]):
            yield found(name, task, about, rows_of_task(about, task))
    else:
        by_task: dict[str, list[Row | None]] = {}
        for split in about["splits"]:
            for record in rows_of(about["hf"], None, split, None):
                rows = by_task.setdefault(str(record[about["each"]]), [])
                if len(rows) < ENOUGH:
                    rows.append(as_row(record, about))
        for task, rows in by_task.items():
            yield found(name, task, about, rows)


def rows_of_task(about: dict, config: str) -> list[Row | None]:
    return [as_row(record, about) for split in about["splits"] for record in rows_of(about["hf"], config, split)]


def found(name: str, task: str, about: dict, rows: list[Row | None]) -> Found:
    """`rows` without those that say nothing, and of one kind: with choices or without, as the first."""
    kept = [row for row in rows if row]
    kept = [row for row in kept if (row.choices is None) == (kept[0].choices is None)]
    begins = [start for start in about.get("categories", {}) if task.startswith(start)]
    category = about["categories"][max(begins, key=len)] if begins else about["category"]
    family = f"{name}/{max(begins, key=len) if begins else task}"
    prompts = about["prompts"]
    if kept and kept[0].choices is None:
        prompts = [prompt for prompt in prompts if "{choices}" not in prompt]
    return Found(f"{name}_{task}", about["source"], about["licence"], category, family, list(prompts), kept)


def as_row(record: dict, about: dict) -> Row | None:
    """None where the record has no label, or its answer is none of its choices. `choices`: words, or templates, that
    the column label counts; `choices_column`: a column of them."""
    text = fill(about["input"], record).strip()
    if "choices" in about:
        label = record["label"]
        choices = [fill(choice, record).strip() for choice in about["choices"]]
        return Row(text, choices[label], choices) if 0 <= label < len(choices) == len(set(choices)) else None
    target = fill(about["target"], record).strip()
    choices = [choice.strip() for choice in record.get(about.get("choices_column", "")) or []]
    choices = list(dict.fromkeys(choices))
    if not choices:
        return Row(text, target, None)
    random.Random(text).shuffle(choices)  # where a source lists the right one first, its place would tell
    return Row(text, target, choices) if target in choices and len(choices) > 1 else None


def configurations(dataset: str) -> list[str]:
    datasets = hub_library("hub=")
    try:
        return datasets.get_dataset_config_names(dataset)
    except Exception as error:
        raise unloaded(f"hf:{dataset}", NETWORK, error) from error


def rows_of(dataset: str, config: str | None, split: str, most: int | None = ENOUGH) -> Iterator[dict]:
    """Streamed; nothing where there is no such split."""
    datasets = hub_library("hub=")
    try:
        tables = datasets.load_dataset(dataset, config, streaming=True)
        yield from islice(tables[split], most) if split in tables else ()
    except Exception as error:  # as in sources.py: the library raises a dozen kinds
        raise unloaded(f"hf:{dataset}/{config}" if config else f"hf:{dataset}", NETWORK, error) from error
