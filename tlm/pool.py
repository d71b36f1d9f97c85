"""`tlm pool show`: a pool as a person reads it, on the terminal and in a page, from one pass over its instances."""

import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tasks.pool import SIDES, SPLITS, Instance, Pool, PoolTask, open_pool
from tasks.prompts import render
from tlm.config import PoolConfig
from tlm.page import Html, element, grid, section, write_page
from tlm.progress import Progress

LARGEST = 10  # families, and lopsided tasks, that are listed
LENGTHS = (0, 8, 16, 32, 64, 128, 256, 512)  # words
EXAMPLE_CHARACTERS = 600


@dataclass
class Counted:
    """What the instances of one task came to. words: the inputs' lengths; chance: the sum of 1/number of choices."""

    task: PoolTask
    splits: Counter = field(default_factory=Counter)
    words: array = field(default_factory=lambda: array("I"))
    chance: float = 0.0
    labels: Counter = field(default_factory=Counter)
    places: Counter = field(default_factory=Counter)
    choices: frozenset[str] | None = None
    same_choices: bool = True
    example: tuple[int, Instance] | None = None  # the one of the smallest checksum: any, but always the same

    def add(self, instance: Instance) -> None:
        self.splits[instance.split] += 1
        self.words.append(len(instance.input.split()))
        key = zlib.crc32(instance.id.encode())
        if self.example is None or key < self.example[0]:
            self.example = key, instance
        if instance.choices:
            self.chance += 1 / len(instance.choices)
            self.labels[instance.target] += 1
            self.places[instance.choices.index(instance.target)] += 1
            choices = frozenset(instance.choices)
            self.choices = self.choices or choices
            self.same_choices &= choices == self.choices

    @property
    def commonest(self) -> tuple[float, str] | None:
        """The commonest answer's share, and which: a label, or, where choices differ, the place of the right one."""
        if not self.labels:
            return None
        ((answer, count),) = (self.labels if self.same_choices else self.places).most_common(1)
        return count / self.splits.total(), answer if self.same_choices else f"choice {answer + 1}"


class Block(NamedTuple):
    """A table with its title and a sentence; all cells are strings."""

    title: str
    note: str | None
    heads: list[str]
    rows: list[list[str]]


def show(path: str, config: PoolConfig) -> int:
    from rich.console import Console

    pool = open_pool(path)
    tasks, progress = pool.select(config.categories), Progress()
    with progress.phase("pool"):
        counted = survey(pool, tasks)
    console, blocks = Console(), survey_blocks(pool, counted)
    examples = [lines for c in one_a_category(counted) if (lines := example(c))]
    console.print(headline(counted), markup=False, highlight=False)
    for block in blocks:
        console.print(rich_table(block))
        if block.note:
            console.print(block.note, markup=False, highlight=False)
    for title, text in examples[: config.examples]:
        console.rule(title.replace("[", r"\["), align="left")
        console.print(text, markup=False, highlight=False)
    if config.out:
        write_page(Path(config.out), f"Pool {Path(path).name}", *page(counted, blocks, examples))
        print(config.out)
    return 0


def survey(pool: Pool, tasks: Sequence[PoolTask]) -> list[Counted]:
    counted = {task.name: Counted(task) for task in tasks}
    for instance in pool.instances(tasks):
        counted[instance.task].add(instance)
    return list(counted.values())


def headline(counted: Sequence[Counted]) -> str:
    splits = sum((c.splits for c in counted), Counter())
    categories, families = (len(grouped(counted, name)) for name in ("category", "family"))
    return (
        f"categories: {categories:,}; families: {families:,}; tasks: {len(counted):,}; instances: {splits.total():,} ("
        + ", ".join(f"{split} {splits[split]:,}" for split in SPLITS)
        + ")"
    )


def survey_blocks(pool: Pool, counted: Sequence[Counted]) -> list[Block]:
    """Categories of each side, families, lengths, balance; and the tasks, if all are of one category."""
    titles, blocks = dict(zip(SIDES, ("Categories that train", "Categories held out"), strict=True)), []
    by_category = grouped(counted, "category")
    for side in SIDES:
        names = [name for name in pool.sides[side] if name in by_category]
        if names:
            rows = [group_row(name, by_category[name]) for name in sorted(names, key=lambda n: -len(by_category[n]))]
            blocks.append(Block(titles[side], None, ["category", *GROUP_HEADS], rows))
    families = sorted(grouped(counted, "family").items(), key=lambda item: -len(item[1]))
    rows = [group_row(name, members) for name, members in families[:LARGEST]]
    title = f"The {LARGEST} largest of {len(families):,} families" if len(families) > LARGEST else "Families"
    blocks += [Block(title, GROUP_NOTE, ["family", *GROUP_HEADS], rows), length_block(counted), *balance_block(counted)]
    if len(by_category) == 1:
        blocks.append(task_block(counted))
    return blocks


def grouped(counted: Iterable[Counted], name: str) -> dict[str, list[Counted]]:
    groups: dict[str, list[Counted]] = {}
    for c in counted:
        groups.setdefault(getattr(c.task, name), []).append(c)
    return groups


GROUP_HEADS = ["tasks", "choice", "instances", "words", "95%", "chance", "top"]
GROUP_NOTE = (
    "choice: tasks that have choices; chance and top: what a random answer, and always the commonest one, would score "
    "on these; words: of the middle input, and below which 95% are."
)


def group_row(name: str, members: Sequence[Counted]) -> list[str]:
    """Under GROUP_HEADS; chance and top are means over tasks."""
    choice = [c for c in members if c.labels]
    middle, most = np.percentile(np.concatenate([c.words for c in members]), [50, 95])
    return [
        name,
        f"{len(members):,}",
        f"{len(choice):,}",
        f"{sum(c.splits.total() for c in members):,}",
        f"{middle:.0f}",
        f"{most:.0f}",
        f"{np.mean([c.chance / c.splits.total() for c in choice]):.0%}" if choice else "-",
        f"{np.mean([c.commonest[0] for c in choice]):.0%}" if choice else "-",
    ]


def length_block(counted: Sequence[Counted]) -> Block:
    counts, _ = np.histogram(np.concatenate([c.words for c in counted]), bins=[*LENGTHS, np.inf])
    names = [f"{low} to {high - 1}" for low, high in pairwise(LENGTHS)]
    shares = counts / counts.sum()
    rows = [
        [name, f"{count:,}", f"{share:.1%}"]
        for name, count, share in zip([*names, f"{LENGTHS[-1]} and more"], counts, shares, strict=True)
    ]
    return Block("Lengths of inputs", None, ["words", "instances", "share"], rows)


def balance_block(counted: Sequence[Counted]) -> list[Block]:
    """The tasks where always saying one thing gains most over chance; none if no task has choices."""
    choice = [c for c in counted if c.labels]
    gains = {c.task.name: c.commonest[0] - c.chance / c.splits.total() for c in choice}
    lopsided = sorted(choice, key=lambda c: -gains[c.task.name])[:LARGEST]
    rows = [
        [c.task.name, c.commonest[1][:40], f"{c.commonest[0]:.0%}", f"{c.chance / c.splits.total():.0%}"]
        for c in lopsided
    ]
    over = sum(gain > 0.2 for gain in gains.values())
    note = f"{over:,} of {len(choice):,} tasks with choices give more than 20 points over chance to a constant answer."
    heads = ["task", "commonest answer", "its share", "chance"]
    return [Block("Label balance, the least even tasks", note, heads, rows)] if choice else []


def task_block(counted: Sequence[Counted]) -> Block:
    rows = [[c.task.name, *group_row("", [c])[3:], str(len(c.task.prompts)), c.task.version] for c in counted]
    return Block("Tasks", None, ["task", *GROUP_HEADS[2:], "templates", "version"], rows)


def one_a_category(counted: Sequence[Counted]) -> list[Counted]:
    """The task of the category's smallest example."""
    groups = grouped((c for c in counted if c.example), "category").values()
    return [min(group, key=lambda c: c.example[0]) for group in groups]


def example(counted: Counted) -> tuple[str, str]:
    """(whose, the rendered prompt, its answers below with the right one marked)."""
    _, instance = counted.example
    prompt = counted.task.prompts[counted.example[0] % len(counted.task.prompts)]
    text, answers, gold = render(prompt, instance.input, instance.target, instance.choices)
    said = [f"{'=>' if i == gold else '  '} {answer}" for i, answer in enumerate(answers)]
    text = text if len(text) <= EXAMPLE_CHARACTERS else f"{text[:EXAMPLE_CHARACTERS]} ... ({len(text):,} characters)"
    return f"{counted.task.category}: {instance.id}", "\n".join([text, *said])


def is_number(cell: str) -> bool:
    return cell == "-" or cell.replace(",", "").replace(".", "").removesuffix("%").isdigit()


def rich_table(block: Block):
    from rich.table import Table
    from rich.text import Text

    table = Table(title=block.title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for head, cells in zip(block.heads, zip(*block.rows, strict=True), strict=True):
        justify = "right" if all(map(is_number, cells)) else "left"
        table.add_column(head, justify=justify, no_wrap=justify == "right", overflow="fold", vertical="top")
    for row in block.rows:
        table.add_row(*map(Text, row))
    return table


def page(counted: Sequence[Counted], blocks: Sequence[Block], examples: Sequence[tuple[str, str]]) -> list[Html]:
    """What the terminal has, an example of every category, and every task."""
    blocks = [block for block in blocks if block.title != "Tasks"]
    cards = (
        element("li", element("h3", title), element("p", text, class_="text"), class_="pair")
        for title, text in examples
    )
    return [
        element("p", headline(counted), class_="lead"),
        *map(block_section, blocks),
        section("Examples", "One of each category; => marks the right answer.", element("ol", *cards, class_="cards")),
        block_section(task_block(counted)),
    ]


def block_section(block: Block) -> Html:
    words = [not all(map(is_number, cells)) for cells in zip(*block.rows, strict=True)]
    rows = [
        [row[0], *(element("td", c, class_="words") if w else c for c, w in zip(row[1:], words[1:], strict=True))]
        for row in block.rows
    ]
    return section(block.title, block.note, grid(block.title, block.heads, rows))
