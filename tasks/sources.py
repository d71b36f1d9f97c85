"""Where a task's records come from: a folder, a file, the catalog, the hub. What they mean is for readers.py."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from tasks import columns, files
from tasks.errors import InputError
from tasks.types import SPLITS

CATALOG = Path(__file__).parent / "catalog"
SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("dev", "development", "validation", "valid", "val"), "dev"),
    **dict.fromkeys(("test", "testing"), "test"),
}
WHOLE = "whole"  # stands for the split of a file that is not divided yet


class Record(NamedTuple):
    path: str
    number: int  # line or row in `path`
    fields: dict

    @property
    def place(self) -> str:
        counted = "row" if self.path.startswith("hf:") or ".parquet" in self.path.lower() else "line"
        return f"{self.path}, {counted} {self.number}"


@dataclass
class Source:
    """Records by split (or under WHOLE), and what the source says of itself.

    card: any of name, labels (a list), metric, text_column, label_column.
    inputs: {"path", "rows", "sha256"} of each file.
    class_names: the label names of integer columns, where the source states them.
    """

    name: str
    records: dict[str, list[Record]]
    card: dict
    inputs: list[dict]
    class_names: dict[str, list[str]] = field(default_factory=dict)


def open_source(spec: str) -> Source:
    """`spec` as in readers.read_task. Raises InputError if it names nothing, or nothing that can be read."""
    if spec.startswith("hf:"):
        return _open_hub(spec)
    if "://" in spec or files.exists(spec):
        found = files.expand(spec)
        if found == [spec]:
            return _from_files(Path(spec).name.split(".")[0], {WHOLE: found}, {})
        return _open_folder(spec.rstrip("/"), found)
    if spec in catalog_names():
        return _open_catalog(spec)
    raise InputError(
        f"{spec}: no such file or folder, and no task of the catalog{columns.nearest(spec, catalog_names())} "
        f"(catalog: {', '.join(catalog_names())})"
    )


def catalog_names() -> list[str]:
    return sorted(path.stem for path in CATALOG.glob("*.yaml"))


def _open_folder(spec: str, found: list[str]) -> Source:
    """Files by the first part of their names: `train.jsonl.gz`, `val.csv`, `test-00000-of-00002.parquet`."""
    by_split: dict[str, list[str]] = {}
    for path in found:
        stem, *shard = re.split(r"-(?=\d+-of-\d+\.)", Path(path).name.lower())
        split = SPLIT_OF.get(stem.split(".")[0])
        if split in by_split and not shard:
            raise InputError(f"{spec}: both {by_split[split][0]} and {path} would be the split {split}; remove one")
        if split:
            by_split.setdefault(split, []).append(path)
    if "train" not in by_split:
        endings = "|".join(files.FORMATS)
        raise InputError(f"{spec}: no training file (train{endings}) in this folder; it has {Path(found[0]).name}")
    card_path = f"{spec}/card.json"
    card = files.read_object(card_path) if files.exists(card_path) else {}
    if not isinstance(card.get("labels", []), list):
        raise InputError(f"{card_path}: labels must be a list")
    name = Path(spec).name or Path(spec).resolve().name
    return _from_files(name, {split: by_split[split] for split in SPLITS if split in by_split}, card)


def _from_files(name: str, by_split: dict[str, list[str]], card: dict) -> Source:
    records, inputs = {}, []
    for split, paths in by_split.items():
        records[split] = []
        for path in paths:
            read = [Record(path, number, fields) for number, fields in files.read_records(path)]
            records[split] += read
            inputs.append({"path": path, "rows": len(read), "sha256": files.sha256(path)})
    return Source(name, records, card, inputs)


def _open_catalog(name: str) -> Source:
    from omegaconf import OmegaConf

    card = {"name": name, **OmegaConf.to_container(OmegaConf.load(CATALOG / f"{name}.yaml"))}
    if "hf" in card:
        return _from_hub(name, card["hf"], card.get("config"), card)
    return _from_files(name, {split: [path] for split, path in card["files"].items()}, card)


def _open_hub(spec: str) -> Source:
    parts = spec.removeprefix("hf:").split("/")
    if len(parts) > 3 or not all(parts):
        raise InputError(f"{spec}: hf:<owner>/<dataset> or hf:<owner>/<dataset>/<config> is wanted")
    return _from_hub(parts[:2][-1], "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, {})


def _from_hub(name: str, dataset: str, config: str | None, card: dict) -> Source:
    where = f"hf:{dataset}/{config}" if config else f"hf:{dataset}"
    datasets = hub_library(where)
    try:
        tables = datasets.load_dataset(dataset, config)
    except Exception as error:
        # Unknown names, data sets that are scripts, no network: the library raises a dozen kinds, and its own.
        raise unloaded(where, "is the name right, is there a network?", error) from error
    wanted = card.get("splits") or {SPLIT_OF[table]: table for table in tables if table in SPLIT_OF}
    if "train" not in wanted or not set(wanted.values()) <= set(tables):
        raise InputError(f"{where}: a split named train is wanted; it has {', '.join(tables)}")
    records, inputs = {}, []
    for split, table in wanted.items():
        path, digest = f"{where}:{table}", hashlib.sha256()
        records[split] = [Record(path, number, fields) for number, fields in enumerate(tables[table], 1)]
        for record in records[split]:
            digest.update(json.dumps(record.fields, default=str).encode())
        inputs.append({"path": path, "rows": len(records[split]), "sha256": digest.hexdigest()})
        if not records[split]:
            raise InputError(f"{path}: the split is empty")
    features = tables[wanted["train"]].features.items()
    return Source(name, records, card, inputs, {c: f.names for c, f in features if isinstance(f, datasets.ClassLabel)})


def hub_library(where: str) -> ModuleType:
    """`datasets`. Raises InputError, about `where`, if it is missing."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{where}: the package `datasets` is missing; pip install tlm[hub]") from error
    return datasets


def unloaded(where: str, question: str, error: Exception) -> InputError:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return InputError(f"{where}: cannot be loaded; {question} ({reason})")
