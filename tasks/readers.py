"""From a folder, a file, a catalog name or a hub name to a Task, with every decision on the way counted in its report.

What the data leave open is decided here once, always the same way: columns by usual names, missing splits by hash of
the text, repeated texts out of train. What cannot be decided is an InputError that says what to change.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

from tasks import columns
from tasks.errors import InputError
from tasks.metrics import METRICS
from tasks.sources import SPLIT_OF, WHOLE, Record, Source, open_source
from tasks.splits import count_overlap, cut, drop_duplicates, split_by_hash
from tasks.types import SPLITS, Example, Task

DEFAULT_METRIC = "macro_f1"


class _Row(NamedTuple):
    record: Record
    number: int  # 1-based, in its split as read
    text: str
    label: str
    id: str | None


_Rows = dict[str, list[_Row]]


def read_task(
    spec: str,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    metric: str | None = None,
    train_limit: int | None = None,
    per_label: int | None = None,
    dev_limit: int | None = None,
    dev_fraction: float = 0.1,
    test_fraction: float = 0.1,
    keep_duplicates: bool = False,
    seed: int = 0,
) -> Task:
    """Reads a task.

    spec: a folder with train|dev|test files (and card.json), one file, a catalog name or `hf:<dataset>[/config]`.
    text_column: one column, or several as "title+text"; it and label_column are guessed if not given (columns.py).
    train_limit, per_label: a few-shot cut of train, drawn by `seed` (splits.cut).
    dev_limit: likewise of dev, which costs as much to score again and again as a short training.
    dev_fraction, test_fraction: of the rows, taken from train by hash of the text where the source has no such split.

    The report: by split, rows "read", and dropped for "blank_text" or "blank_label"; "split_by_hash", the splits made
    here, and "moved_to_train", their rows whose label train lacked; "overlap", texts in two splits, before any is
    dropped; "train_duplicates" (splits.drop_duplicates), dropped unless keep_duplicates; "unused_labels" of the card;
    "train_before_cut". Raises InputError for whatever a user can mend.
    """
    _check_arguments(train_limit, per_label, dev_limit, dev_fraction, test_fraction)
    _check_metric("metric", metric or DEFAULT_METRIC)
    source = open_source(spec)
    metric = metric or _check_metric(f"{spec}, card.json", source.card.get("metric", DEFAULT_METRIC))

    report = {"read": {split: len(records) for split, records in source.records.items()}}
    rows = _read_rows(source, text_column, label_column, report)
    rows = _use_split_column(rows)
    rows = _make_missing_splits(rows, dev_fraction, test_fraction, report)
    for split in SPLITS:
        if not rows[split]:
            raise InputError(_empty_split(spec, split, report))
    splits = _to_examples(rows)

    report["overlap"] = count_overlap(splits)
    unique, report["train_duplicates"] = drop_duplicates(splits["train"], splits["dev"] + splits["test"])
    if not keep_duplicates:
        splits["train"] = unique
    labels = _check_labels(spec, splits, source.card.get("labels"), report)
    report["train_before_cut"] = len(splits["train"])
    splits["train"] = cut(splits["train"], limit=train_limit, per_label=per_label, seed=seed)
    splits["dev"] = cut(splits["dev"], limit=dev_limit, seed=seed)
    if len({example.label for example in splits["train"]}) == 1:
        raise InputError(f"train_limit={train_limit}: this leaves examples of one label only; raise it")
    return Task(
        name=str(source.card.get("name", source.name)),
        labels=labels,
        metric=metric,
        splits={split: tuple(splits[split]) for split in SPLITS},
        source=spec,
        inputs=tuple(source.inputs),
        report=report,
    )


def _check_arguments(train_limit, per_label, dev_limit, dev_fraction, test_fraction) -> None:
    if train_limit is not None and per_label is not None:
        raise InputError("train_limit and per_label exclude each other; give one of them")
    for key, value in {"train_limit": train_limit, "per_label": per_label, "dev_limit": dev_limit}.items():
        if value is not None and value < 1:
            raise InputError(f"{key}={value}: at least 1 is wanted")
    if not (0 < dev_fraction < 1 and 0 < test_fraction < 1 and dev_fraction + test_fraction < 1):
        fractions = f"dev_fraction={dev_fraction}, test_fraction={test_fraction}"
        raise InputError(f"{fractions}: each must lie between 0 and 1, and their sum below 1")


def _check_metric(where: str, metric: str) -> str:
    if metric not in METRICS:
        near, known = columns.nearest(str(metric), METRICS), ", ".join(METRICS)
        raise InputError(f"{where}: unknown metric {metric!r}{near} (known: {known})")
    return metric


def _empty_split(spec: str, split: str, report: dict) -> str:
    blank = sum(report[why].get(part, 0) for why in ("blank_text", "blank_label") for part in (split, WHOLE))
    dropped = f" ({blank} rows had no text or no label)" if blank else ""
    mend = f"give more rows, or a larger {split}_fraction" if split in report["split_by_hash"] else "give it rows"
    return f"{spec}: the split {split} is empty{dropped}; {mend}"


# From records to rows


def _read_rows(source: Source, text_column: str | None, label_column: str | None, report: dict) -> _Rows:
    first = source.records.get("train", source.records.get(WHOLE))[0]
    names = list(first.fields)
    texts = columns.text_columns(names, text_column or source.card.get("text_column"), first.path)
    label = columns.label_column(names, label_column or source.card.get("label_column"), first.path)
    if label in texts:
        raise InputError(f"{first.path}: the column {label!r} cannot be both text and label")
    own_id = columns.id_column([name for name in names if name not in [*texts, label]])

    def row(record: Record, number: int) -> _Row:
        text = " ".join(filter(None, (_text(record, column) for column in texts)))
        own = record.fields.get(own_id)
        return _Row(record, number, text, _label(record, label), None if own is None else str(own))

    rows = {split: [row(r, n) for n, r in enumerate(records, 1)] for split, records in source.records.items()}
    rows = _name_labels(rows, source.card.get("labels") or source.class_names.get(label))
    report["blank_text"] = {split: sum(not row.text for row in part) for split, part in rows.items()}
    report["blank_label"] = {split: sum(not row.label for row in part if row.text) for split, part in rows.items()}
    return {split: [row for row in part if row.text and row.label] for split, part in rows.items()}


def _text(record: Record, column: str) -> str:
    value = record.fields[columns.present(column, record.fields, record.place)]
    if isinstance(value, dict | list | bool):
        kind = type(value).__name__
        raise InputError(f"{record.place}: the column {column!r} holds a {kind}, not a text; name another")
    return "" if value is None or value != value else str(value).strip()  # NaN alone is unequal to itself


def _label(record: Record, column: str) -> str:
    value = record.fields[columns.present(column, record.fields, record.place)]
    if isinstance(value, dict | list):
        kind = type(value).__name__
        raise InputError(f"{record.place}: the label {str(value)[:40]!r} is a {kind}; one label a text is wanted")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)  # integers beside missing values become floats in many tables
    return "" if value is None or value != value else str(value).strip()


def _name_labels(rows: _Rows, names: list | None) -> _Rows:
    """Where names are stated: numbers become the names they index (-1, the hub's "no label", a blank one)."""
    if not names:
        return rows
    names = [str(name) for name in names]
    labelled = [row for part in rows.values() for row in part if row.label]
    if all(row.label in names for row in labelled):
        return rows
    if all(re.fullmatch(r"-1|\d+", row.label) for row in labelled):
        name_of = {str(number): name for number, name in enumerate(names)} | {"-1": "", "": ""}
    else:
        name_of = {name: name for name in [*names, ""]}
    for row in labelled:
        if row.label not in name_of:
            near, known = columns.nearest(row.label, names), f"{', '.join(names[:20])}{', ...' * (len(names) > 20)}"
            raise InputError(f"{row.record.place}: the label {row.label!r} is not among the stated{near} ({known})")
    return {split: [row._replace(label=name_of[row.label]) for row in part] for split, part in rows.items()}


# From rows to splits


def _use_split_column(rows: _Rows) -> _Rows:
    """A file whose column `split` or `fold` says train, dev or test is divided by it."""
    if not rows.get(WHOLE):
        return rows
    column = columns.split_column(list(rows[WHOLE][0].record.fields))
    stated = [str(row.record.fields.get(column)).strip().lower() for row in rows[WHOLE]]
    if column is None or stated[0] not in SPLIT_OF:
        return rows
    divided: _Rows = {}
    for row, split in zip(rows[WHOLE], stated, strict=True):
        if split not in SPLIT_OF:
            raise InputError(f"{row.record.place}: the column {column!r} says {split!r}, not train, dev or test")
        divided.setdefault(SPLIT_OF[split], []).append(row)
    if "train" not in divided:
        raise InputError(f"{rows[WHOLE][0].record.path}: the column {column!r} says train in no row")
    return divided


def _make_missing_splits(rows: _Rows, dev_fraction: float, test_fraction: float, report: dict) -> _Rows:
    missing = [split for split in ("dev", "test") if split not in rows]
    result = {"train": [], "dev": rows.get("dev", []), "test": rows.get("test", [])}
    for row in rows.get(WHOLE, rows.get("train", [])):
        split = split_by_hash(row.text, dev_fraction, test_fraction)
        result[split if split in missing else "train"].append(row)
    # The hash knows nothing of labels: a rare one may miss train, where it could not be learnt.
    learnable = {row.label for row in result["train"]}
    moved = [row for split in missing for row in result[split] if row.label not in learnable]
    for split in missing:
        result[split] = [row for row in result[split] if row.label in learnable]
    result["train"] += moved
    report["split_by_hash"], report["moved_to_train"] = missing, len(moved)
    return result


def _to_examples(rows: _Rows) -> dict[str, list[Example]]:
    """With the records' own ids where each has one and no two are the same; else "train-17" for the 17th row read."""
    ids = [row.id for split in SPLITS for row in rows[split]]
    own = None not in ids and len(set(ids)) == len(ids)
    return {
        split: [Example(row.id if own else f"{split}-{row.number}", row.text, row.label) for row in rows[split]]
        for split in SPLITS
    }


def _check_labels(spec: str, splits: dict[str, list[Example]], stated: list | None, report: dict) -> tuple[str, ...]:
    """Train's labels, in the card's order or sorted. Raises InputError where learning or testing could not work."""
    found = {split: Counter(example.label for example in splits[split]) for split in SPLITS}
    if not found["train"]:
        raise InputError(f"{spec}: every text of train stands in dev or test too; divide the data anew")
    for split in ("dev", "test"):
        if unknown := sorted(found[split].keys() - found["train"].keys()):
            counts = ", ".join(f"{label!r} ({found[split][label]} texts)" for label in unknown[:10])
            counts += f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
            mend = "add examples of them to train, or remove these"
            raise InputError(f"{spec}: {split} has labels that train lacks: {counts}; {mend}")
    if len(found["train"]) == 1:
        raise InputError(f"{spec}: train has one label only, {min(found['train'])!r}; at least two are wanted")
    key = int if all(label.isdecimal() for label in found["train"]) else str
    order = [str(label) for label in stated or sorted(found["train"], key=key)]
    report["unused_labels"] = [label for label in order if label not in found["train"]]
    return tuple(label for label in order if label in found["train"])
