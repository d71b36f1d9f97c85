"""Prompted instances as a model reads them, and the objective that trains on them, with general text or without.

An instance is [CLS] prompt [SEP] answer [SEP]: the model reads all but the last token, and its loss is that of the
answer's tokens, the last [SEP] among them. General text is [CLS] piece [SEP], every token of it predicted from those
before. Which instance under which template a batch holds is one number (see `Number`), so that the mixture's examples
are plain integers, as those of any other source.

A prompt that is too long loses its beginning, as in lm-eval, since templates ask at their end. An answer gets half of
the window at most.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from torch import nn

from tasks.pool import Instance, PoolTask
from tasks.prompts import Prompt, Prompted, listed, render
from tlm.batches import IGNORE, Batch, pack
from tlm.instances import Instances
from tlm.mixture import EXTERNAL, TASK, MicroBatch, Mixture, uniforms
from tlm.model import ModelShape, training_flops
from tlm.objectives import Losses, Source, Weighted, parts
from tlm.task_mixture import TaskMixture
from tlm.tokenizer import CLS, SEP, Encoder

FALLBACK_SHARE = 0.1  # of the examples train the soft prompt of all tasks instead of their own
MOST_TEMPLATES = 1000


class Example(NamedTuple):
    """inputs int64[n]; targets int64[n], or IGNORE; answer: how many of the inputs, the last ones, are the answer's."""

    inputs: np.ndarray
    targets: np.ndarray
    answer: int


class Number(NamedTuple):
    """What one integer says: a row of Instances, a template of its task, and whether its own soft prompt leads it."""

    row: int
    template: int
    own: bool

    @classmethod
    def of(cls, number: int) -> "Number":
        rest, own = divmod(int(number), 2)
        return cls(*divmod(rest, MOST_TEMPLATES), bool(own))

    @staticmethod
    def join(rows: np.ndarray, templates: np.ndarray, own: np.ndarray) -> np.ndarray:
        return (rows * MOST_TEMPLATES + templates) * 2 + own


def variants(task: PoolTask, choices: str, most: int | None = None) -> tuple[Prompt, ...]:
    """The prompts of a task, its first `most` templates: with its choices listed, without, or both. A template that
    cannot go without listing them stays."""
    prompts = task.prompts[:most]
    if task.format == "generate":
        return prompts[:MOST_TEMPLATES]
    found = listed(prompts, False) if choices != "listed" else ()
    if choices != "unlisted" or not found:
        found += listed(prompts, True)
    return found[:MOST_TEMPLATES]


@dataclass(frozen=True)
class Reader:
    """Text -> tokens. `soft`: vectors in front of a prompt; `slots`: whose a task's own are (0: those of all tasks)."""

    tokenizer: Tokenizer
    max_length: int
    soft: int = 0
    slots: dict[str, int] | None = None

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer)

    @property
    def most_answer(self) -> int:
        """Tokens of an answer, the [SEP] that ends it among them."""
        return self.max_length // 2

    def slot(self, task: str | None) -> int:
        return (self.slots or {}).get(task, 0)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        ids, lengths = self.encoder(list(texts))
        ends = np.cumsum(lengths)
        return [ids[end - length : end].astype(np.int64) for length, end in zip(lengths, ends, strict=True)]

    def answers(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each ended by [SEP], unless it is cut."""
        return [np.append(ids, SEP)[: self.most_answer] for ids in self.encode(texts)]

    def prompt(self, ids: np.ndarray, answer: int, task: str | None) -> np.ndarray:
        """[CLS] soft prompt, text, [SEP], where an answer of so many tokens is to follow."""
        first = self.tokenizer.get_vocab_size() + self.soft * self.slot(task)
        room = self.max_length - 2 - self.soft - (answer - 1)
        return np.concatenate([[CLS], np.arange(first, first + self.soft), ids[max(0, len(ids) - room) :], [SEP]])

    def example(self, prompted: Prompted, task: str | None) -> Example:
        text, answer = self.encode([prompted.text, prompted.answers[prompted.gold]])
        answer = np.append(answer, SEP)[: self.most_answer]
        prompt = self.prompt(text, len(answer), task)
        targets = np.full(len(prompt) + len(answer) - 1, IGNORE)
        targets[len(prompt) - 1 :] = answer
        return Example(np.concatenate([prompt, answer[:-1]]), targets, len(answer) - 1)


def language(tokens: np.ndarray) -> Example:
    """General text, int64[n]: nothing of it is a prompt."""
    return Example(tokens[:-1], tokens[1:], len(tokens) - 1)


@dataclass(frozen=True)
class PromptSource:
    """The prompted instances of a pool, by Number. `lengths`: of a sample of what the mixture draws."""

    instances: Instances
    prompts: dict[str, tuple[Prompt, ...]]
    reader: Reader
    lengths: np.ndarray
    answers: np.ndarray  # tokens to be predicted, of the same sample

    def __len__(self) -> int:
        return len(self.lengths)

    def example(self, number: int) -> Example:
        row, template, own = Number.of(number)
        instance = self.instances[row]
        prompted = rendered(instance, self.prompts[instance.task][template])
        return self.reader.example(prompted, instance.task if own else None)


def chosen_prompt(instance: Instance, task: PoolTask, choices: str, most: int | None) -> Prompt:
    """One of the task's, drawn by the instance's name."""
    prompts = variants(task, choices, most)
    return prompts[zlib.crc32(instance.id.encode()) % len(prompts)]


def rendered(instance: Instance, prompt: Prompt) -> Prompted:
    return render(prompt, instance.input, instance.target, instance.choices)


@dataclass(frozen=True)
class PromptMixture(Mixture):
    """A Mixture whose task examples are Numbers, drawn by `tasks` out of `rows` (of Instances, by task)."""

    tasks: TaskMixture | None = None
    rows: tuple[np.ndarray, ...] = ()

    def examples_at(self, source: str, positions: np.ndarray) -> np.ndarray:
        if source != TASK:
            return super().examples_at(source, positions)
        drawn = self.tasks.at(positions)
        rows = np.array([self.rows[t][i] for t, i in zip(drawn.tasks, drawn.instances, strict=True)], dtype=np.int64)
        return Number.join(rows, drawn.templates, uniforms(self.seed, "soft", 0, positions) >= FALLBACK_SHARE)


@dataclass(frozen=True)
class PromptedObjective:
    """Turns a step's micro-batches into packed batches, as Objective does: the step's loss is the mean over its
    micro-batches, where each term is a mean over all tokens to be predicted that those of its source hold."""

    prompts: PromptSource
    external: Source | None = None
    together = 1  # see Objective

    @property
    def sources(self) -> dict[str, PromptSource | Source]:
        return {TASK: self.prompts} | ({EXTERNAL: self.external} if self.external else {})

    @property
    def rate(self) -> float:
        """At most; see Objective."""
        return 1.0 if self.external else float(self.prompts.answers.sum() / self.prompts.lengths.sum())

    def flops(self, source: str, shape: ModelShape) -> float:
        lengths = self.sources[source].lengths - (source == EXTERNAL)
        return training_flops(shape, lengths, self.prompts.answers.sum() if source == TASK else lengths.sum())

    def losses(self, model: nn.Module) -> nn.Module:
        return NextTokenLosses(model)

    def example(self, source: str, number: int) -> Example:
        return self.prompts.example(number) if source == TASK else language(self.external.sequence(number))

    def step(
        self, micros: list[MicroBatch], rank: int = 0, world: int = 1, most_tokens: int | None = None
    ) -> list[Weighted]:
        """The share of `rank`, in parts of about `most_tokens` tokens."""
        examples = [[self.example(micro.source, number) for number in micro.examples] for micro in micros]
        result = []
        for micro, group in zip(micros, examples, strict=True):
            same = [other for m, other in zip(micros, examples, strict=True) if m.source == micro.source]
            predicted = sum((example.targets != IGNORE).sum() for other in same for example in other)
            weight = len(same) / len(micros) / float(predicted)
            weights = {"mlm": 0.0, "task": weight} if micro.source == TASK else {"mlm": weight, "task": 0.0}
            for part in parts([len(example.inputs) for example in group], rank, world, most_tokens):
                result.append(Weighted(micro.source, packed([group[i] for i in part]), **weights))
        return result


def packed(examples: Sequence[Example]) -> Batch:
    inputs, targets, answers = zip(*examples, strict=True)
    return pack(inputs, targets, answers=[(answer,) if answer else () for answer in answers])


class NextTokenLosses(Losses):
    """As Losses, of the next token: (sum over general text, sum over answers), None where off."""

    def forward(self, batch: Batch, mlm: bool, task: bool):
        loss = self.model.mlm_loss_sum(self.model(batch)[batch.masked], batch.masked_tokens)
        return (loss, None) if mlm else (None, loss)
