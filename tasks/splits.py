"""Which example belongs to which split: by hash of the text, without texts that stand in two of them, few-shot cuts.

Hashing the text, rather than drawing at random, keeps a text in its split when rows are added, removed or reordered,
and keeps repeated texts together; the price is that the fractions are met only on average.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from tasks.types import Example

_IGNORED = re.compile("[.,;:!?'\"`‘’“”…–—-]")


def text_key(text: str) -> str:
    """Two texts count as the same if their keys are equal: case, spacing and sentence punctuation are ignored.

    Brackets and other marks count: `[[ a ]] of << b >>` and `<< a >> of [[ b ]]` are two examples of a relation task.
    """
    return " ".join(_IGNORED.sub(" ", text.casefold()).split()) or text


def split_by_hash(text: str, dev_fraction: float, test_fraction: float) -> str:
    """Gives "train", "dev" or "test", always the same for a text, whatever else the data holds."""
    digest = hashlib.sha256(text_key(text).encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64  # uniform in [0, 1)
    if place < test_fraction:
        return "test"
    return "dev" if place < test_fraction + dev_fraction else "train"


def count_overlap(splits: dict[str, Sequence[Example]]) -> dict[str, int]:
    """How many examples of one split have a text that stands in the other, for "train_in_dev", "train_in_test" ..."""
    keys = {split: [text_key(example.text) for example in examples] for split, examples in splits.items()}
    pairs = [("train", "dev"), ("train", "test"), ("dev", "test"), ("test", "train")]
    return {f"{a}_in_{b}": sum(map(set(keys[b]).__contains__, keys[a])) for a, b in pairs}


def drop_duplicates(train: Sequence[Example], held_out: Sequence[Example]) -> tuple[list[Example], dict[str, int]]:
    """`train` without texts of `held_out` (dev and test) and without repeats of a text under the same label.

    A text that bears several labels keeps one example of each: which is right is not ours to say, so it is counted.
    Returns the rest and {"in_dev_or_test", "repeats", "with_several_labels"}.
    """
    barred = {text_key(example.text) for example in held_out}
    labels, kept, counts = defaultdict(set), [], Counter(in_dev_or_test=0, repeats=0)
    for example in train:
        key = text_key(example.text)
        if key in barred:
            counts["in_dev_or_test"] += 1
        elif example.label in labels[key]:
            counts["repeats"] += 1
        else:
            labels[key].add(example.label)
            kept.append(example)
    several = sum(len(found) > 1 for found in labels.values())
    return kept, {**counts, "with_several_labels": several}


def cut(
    examples: Sequence[Example], *, limit: int | None = None, per_label: int | None = None, seed: int = 0
) -> list[Example]:
    """A random part of a split, in its order: `per_label` examples of each label, or `limit` altogether.

    `limit` keeps the labels' shares, but at least one example of each as long as it is not less than the number
    of labels. Each label's examples are drawn in one fixed random order, so a larger cut holds a smaller one
    (for `limit`, up to rounding of the shares).
    """
    rows = defaultdict(list)
    for row, example in enumerate(examples):
        rows[example.label].append(row)
    labels = sorted(rows)
    sizes = np.array([len(rows[label]) for label in labels])
    wanted = sizes if per_label is None else np.minimum(sizes, per_label)
    if limit is not None and limit < wanted.sum():
        wanted = _shares(wanted, limit)
    kept = []
    for number, (label, count) in enumerate(zip(labels, wanted, strict=True)):
        order = np.random.default_rng([seed, number]).permutation(len(rows[label]))
        kept += [rows[label][i] for i in order[:count]]
    return [examples[row] for row in sorted(kept)]


def _shares(sizes: np.ndarray, total: int) -> np.ndarray:
    """`total` dealt out in proportion to `sizes`, one by one to whoever is furthest below its share; int[L]."""
    due = total * sizes / sizes.sum()
    dealt = np.minimum(sizes, 1) if total >= len(sizes) else np.zeros_like(sizes)
    for _ in range(total - dealt.sum()):
        dealt[np.argmax(np.where(dealt < sizes, due - dealt, -np.inf))] += 1
    return dealt
