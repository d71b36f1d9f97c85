"""What a task is: labelled texts in three splits. Immutable, so that its fingerprint names it for good."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Example:
    id: str
    text: str
    label: str


@dataclass(frozen=True)
class Task:
    """Labelled texts; a label's number is its place in `labels`.

    inputs: {"path", "rows", "sha256"} of each file read. report: what was dropped, moved or found twice (see readers).
    """

    name: str
    labels: tuple[str, ...]
    metric: str
    splits: dict[str, tuple[Example, ...]]  # keys: SPLITS
    source: str
    inputs: tuple[dict, ...]
    report: dict

    def texts(self, split: str) -> list[str]:
        return [example.text for example in self.splits[split]]

    def targets(self, split: str) -> list[int]:
        number = {label: i for i, label in enumerate(self.labels)}
        return [number[example.label] for example in self.splits[split]]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of labels, metric and examples, in order. Where they were read from and their name play no part."""
        digest = hashlib.sha256(json.dumps([self.labels, self.metric]).encode())
        for split in SPLITS:
            digest.update(f"\n{split}".encode())
            for example in self.splits[split]:
                digest.update(("\n" + json.dumps([example.id, example.text, example.label])).encode())
        return digest.hexdigest()
