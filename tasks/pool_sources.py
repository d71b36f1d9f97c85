"""Published collections of tasks that pip packages carry, brought to the form of a pool.

`bigbench` is a source archive of 358 MB, read as it is or unpacked; of `evals` the folder `registry/data` is read.
Nothing is made up: inputs and answers are the source's; prompts are its own instruction and its own description.
Languages are not filtered. BIG-bench asks that its data stay out of general pretraining corpora.
"""

import json
import random
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tasks.errors import InputError
from tasks.splits import split_by_hash, text_key

MOST = {"train": 400, "test": 100}  # instances of a task
LEAST = 16
TEST_FRACTION = 0.2
LONGEST_INPUT, LONGEST_TARGET = 2000, 600  # characters
MOST_LABELS = 10  # a task of `evals` with no more answers than these, each said 4 times or more, is one of choices

# A BIG-bench task's category is the first of these that its authors gave it. Held out are those that come first, so
# that a task with any of their names is kept from training.
HELDOUT_KEYWORDS = (
    "paraphrase", "causal reasoning", "figurative language", "word sense disambiguation", "theory of mind",
)  # fmt: skip
KEYWORDS = (
    *HELDOUT_KEYWORDS, "translation", "summarization", "algorithms", "arithmetic", "mathematics", "social bias",
    "emotional understanding", "computer code", "analogical reasoning", "linguistics", "negation", "fallacy", "riddle",
    "logical reasoning", "social reasoning", "context-free question answering", "contextual question-answering",
    "reading comprehension", "common sense", "visual reasoning", "creativity", "multilingual", "domain specific",
)  # fmt: skip


class Row(NamedTuple):
    input: str
    target: str
    choices: list[str] | None


@dataclass(frozen=True)
class Found:
    """A task of a source; `rows` as they stand there."""

    name: str
    source: str
    licence: str
    category: str
    family: str
    prompts: list[str]
    rows: list[Row]


def records(found: Found, shard: str) -> tuple[dict, list[dict]] | None:
    """The task's line and its instances' lines; None if too few are left.

    Rows with blank or too long texts are left out, and repeats of an input; train or test is decided by the input's
    hash, the same in all tasks; of each as many as MOST are drawn, always the same.
    """
    sides: dict[str, list[Row]] = {split: [] for split in MOST}
    seen = set()
    for row in sorted(found.rows, key=lambda row: (zlib.crc32(row.input.encode()), row.input)):
        if all(len(sides[split]) == most for split, most in MOST.items()):
            break
        if not row.input.strip() or not row.target.strip() or len(row.input) > LONGEST_INPUT:
            continue
        key, split = text_key(row.input), split_by_hash(row.input, 0, TEST_FRACTION)
        fits = max(map(len, row.choices or [row.target])) <= LONGEST_TARGET
        if fits and key not in seen and len(sides[split]) < MOST[split]:
            sides[split].append(row)
            seen.add(key)
    if not all(sides.values()) or sum(map(len, sides.values())) < LEAST:
        return None
    task = {
        "task": found.name, "source": found.source, "category": found.category, "family": found.family,
        "format": "choice" if found.rows[0].choices else "generate", "prompts": found.prompts,
        **{f"n_{split}": len(rows) for split, rows in sides.items()}, "licence": found.licence, "shard": shard,
    }  # fmt: skip
    lines = [
        {"task": found.name, "id": f"{found.name}-{split}-{i}", "split": split, **row._asdict()}
        for split, rows in sides.items()
        for i, row in enumerate(rows)
    ]
    return task, lines


def read_bigbench(path: str) -> Iterator[Found]:
    """The JSON tasks of a `bigbench-*.tar.gz` or of the folder unpacked from it; programmatic tasks are left out."""
    for name, content in _task_files(path):
        try:
            task = json.loads(content)
        except ValueError as error:
            raise InputError(f"{path}: {name} is not JSON: {error}") from error
        parts = name.split("benchmark_tasks/")[-1].removesuffix("/task.json").split("/")
        full_name = "bb_" + re.sub(r"\W+", "_", "_".join(parts))
        if rows := _bigbench_rows(full_name, task.get("examples") or []):
            yield Found(
                full_name, "BIG-bench", "Apache-2.0 (repository; single tasks may name their own sources)",
                _category(task.get("keywords", [])), f"bigbench/{parts[0]}",
                _bigbench_prompts(task, with_choices=rows[0].choices is not None), rows,
            )  # fmt: skip


def _task_files(path: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every task.json below `benchmark_tasks`; the archive is read once, as a stream."""
    place = Path(path).expanduser()
    if place.is_dir():
        found = sorted(p for p in place.rglob("task.json") if "benchmark_tasks" in p.parts)
        if not found:
            raise InputError(f"{path}: no benchmark_tasks/NAME/task.json below; name the unpacked archive of bigbench")
        yield from ((str(p), p.read_bytes()) for p in found)
        return
    try:
        with tarfile.open(place, "r|*") as archive:
            for member in archive:
                if "benchmark_tasks/" in member.name and member.name.endswith("/task.json"):
                    yield member.name, archive.extractfile(member).read()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; `pip download --no-deps bigbench==1.0.0` fetches it") from error
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise InputError(f"{path}: not a sound archive ({error}); fetch it again") from error


def _bigbench_rows(name: str, examples: Sequence[dict]) -> list[Row]:
    """Those of the first one's kind. With choices: the one of the highest score, where it is alone, is right."""
    rows = []
    for example in examples:
        scores, text, target = example.get("target_scores"), example["input"], example.get("target")
        if scores:
            best = [choice for choice, score in scores.items() if score == max(scores.values())]
            if len(best) == 1 < len(scores):
                choices = sorted(scores)
                random.Random(f"{name} {text}").shuffle(choices)
                rows.append(Row(text, best[0], choices))
        elif target and (isinstance(target, str) or isinstance(target[0], str)):
            rows.append(Row(text, target if isinstance(target, str) else target[0], None))
    return [row for row in rows if (row.choices is None) == (rows[0].choices is None)]


def _bigbench_prompts(task: dict, with_choices: bool) -> list[str]:
    """As BIG-bench asks (its defaults are Q and A), and with the task's description, choices listed and not."""
    ask, answer = task.get("example_input_prefix", "\nQ: "), task.get("example_output_prefix", "\nA: ")
    described = f"{task['description'].strip()}\n\n"
    prompts = [
        template(f"{task.get('task_prefix', '')}{ask}".lstrip(), answer.rstrip()),
        template(described, "\nAnswer:"),
    ]
    if with_choices:
        prompts.append(template(described, "\nOptions:\n", "choices", "\nAnswer:"))
    return prompts


def _category(keywords: Sequence[str]) -> str:
    return category_name(next((word for word in KEYWORDS if word in keywords), "other"))


def category_name(keyword: str) -> str:
    return re.sub(r"\W", "_", keyword)


def template(before: str, between: str, more: str | None = None, after: str = "") -> str:
    """Words around `input`, and around another field if there is one; their own braces stay what they are."""
    parts = [before, between, after]
    if any("{" in part for part in parts):
        before, between, after = (f"{{{{ {part!r} }}}}" if "{" in part else part for part in parts)
        return f"{before}{{{{ input }}}}{between}" + (f"{{{{ {more} }}}}{after}" if more else "")
    return f"{before}{{input}}{between}" + (f"{{{more}}}{after}" if more else "")


def read_evals(path: str) -> Iterator[Found]:
    """The files below `registry/data` of the package `evals` that ask one thing and state the ideal answer."""
    root = Path(path).expanduser()
    found = sorted(root.rglob("*.jsonl"))
    if not found:
        raise InputError(f"{path}: no .jsonl file below; name the folder registry/data of the package evals")
    for file in found:
        rows = _evals_rows(str(file))
        if len(rows) < LEAST:
            continue
        systems = {system for system, _, _ in rows}
        shared = f"{systems.pop().strip()}\n\n" if len(systems) == 1 else ""
        labels = sorted({target for _, _, target in rows})
        choices = labels if 1 < len(labels) <= min(MOST_LABELS, len(rows) // 4) else None
        parts = file.relative_to(root).with_suffix("").parts
        yield Found(
            "oe_" + re.sub(r"\W+", "_", "_".join(p for p in parts if p != "samples")), "OpenAI evals",
            "MIT (repository; single evals may name their own)", "openai_evals", f"oe/{parts[0]}",
            [template(shared.lstrip(), ""), template(shared.lstrip(), "\nAnswer:")],
            [Row(text if shared else f"{system}\n\n{text}".strip(), target, choices) for system, text, target in rows],
        )  # fmt: skip


def _json_lines(path: str) -> Iterator[dict]:
    """Some of these files end their lines with a bare carriage return, which tasks.files takes for a blank."""
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip() and isinstance(record := json.loads(line), dict):
                    yield record
            except ValueError as error:
                raise InputError(f"{path}, line {number}: not JSON: {error}") from error


def _evals_rows(path: str) -> list[tuple[str, str, str]]:
    """(system message or nothing, user's message, ideal answer); none where the file's first line has another form."""
    rows = []
    for record in _json_lines(path):
        messages, ideal = record.get("input"), record.get("ideal")
        ideal = ideal[0] if isinstance(ideal, list) and ideal else ideal
        if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
            *before, last = [(message.get("role"), message.get("content")) for message in messages] or [(None, None)]
            texts = [content for _, content in before] + [last[1], ideal]
            one_question = last[0] == "user" and [role for role, _ in before] in ([], ["system"])
            if one_question and all(isinstance(text, str) for text in texts):
                rows.append((before[0][1] if before else "", last[1], ideal))
        if not rows:
            return []
    return rows
