"""Prompts: an instance of a pool -> the text that a model reads, and the answers that it chooses among.

Templates come with pools, so from strangers: they are Jinja in its sandbox, and see `input` and `choices` of one
instance and nothing else. (That keeps a template to its data; it does not bound the time that one may take.) `choices`
prints as the prompt lists them, and can be looped over. The short form `{input}` is read as `{{ input }}`.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, lru_cache
from typing import NamedTuple

from jinja2 import StrictUndefined, Template, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from tasks.errors import InputError

FIELDS = ("input", "choices")
RENDERING = 1  # part of every version: raise it when the same prompt would give another text
_JINJA_MARKS = ("{{", "{%", "{#")


def letter(number: int) -> str:
    """0 -> A, 25 -> Z, 26 -> AA, as spreadsheets count."""
    return (letter(number // 26 - 1) if number >= 26 else "") + chr(ord("A") + number % 26)


def _lines(words: Sequence[str]) -> str:
    return "\n".join(f"- {word}" for word in words)


def _commas(words: Sequence[str]) -> str:
    return " or ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def _letters(words: Sequence[str]) -> str:
    return "\n".join(f"{letter(i)}. {word}" for i, word in enumerate(words))


LISTINGS: dict[str, Callable[[Sequence[str]], str]] = {"lines": _lines, "commas": _commas, "letters": _letters}


@dataclass(frozen=True)
class Prompt:
    """answers: the words that say a choice; one that is not named says itself. listing: of LISTINGS; where a template
    lists choices by letters, the answer is the letter."""

    template: str
    listing: str = "lines"
    answers: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def lists_choices(self) -> bool:
        return "choices" in fields(self.template)


class Prompted(NamedTuple):
    """What a model reads and says: `answers[gold]` is right. Without choices the one answer is the target."""

    text: str
    answers: tuple[str, ...]
    gold: int


class _Choices(tuple):
    """The words of the choices, printed as the prompt lists them."""

    listing: str = "lines"

    def __str__(self) -> str:
        return LISTINGS[self.listing](self)


def read_prompt(value: str | dict) -> Prompt:
    """A template, or {"template", "listing", "answers"}. Raises InputError for what could never be rendered."""
    given = {"template": value} if isinstance(value, str) else value
    if not isinstance(given, dict) or not isinstance(given.get("template"), str):
        raise InputError(f"a prompt is a template or an object with one, not {str(value)[:60]!r}")
    if unknown := sorted(given.keys() - {"template", "listing", "answers"}):
        raise InputError(f"a prompt has no key {unknown[0]!r}; use template, listing, answers")
    prompt = Prompt(**given)
    if prompt.listing not in LISTINGS:
        raise InputError(f"listing {prompt.listing!r}: use one of {', '.join(LISTINGS)}")
    if not isinstance(prompt.answers, dict) or not all(isinstance(words, str) for words in prompt.answers.values()):
        raise InputError("answers: an object of choice and words is wanted")
    if unknown := sorted(fields(prompt.template) - set(FIELDS)):
        raise InputError(f"{_quoted(prompt.template)} has the unknown field {unknown[0]!r}; use {' and '.join(FIELDS)}")
    if any(mark in prompt.template for mark in _JINJA_MARKS):  # code: tried, so that it is refused before a run begins
        _render(prompt, "an input", ("first", "second"))
    return prompt


def render(prompt: Prompt, input: str, target: str, choices: Sequence[str] | None) -> Prompted:
    """Raises InputError for a template that fails, two choices said alike, and a target outside its choices."""
    if choices is None:
        return Prompted(_render(prompt, input, None), (prompt.answers.get(target, target),), 0)
    if target not in choices:
        raise InputError(f"the target {target[:60]!r} is none of its choices")
    words = [prompt.answers.get(choice, choice) for choice in choices]
    text = _render(prompt, input, words)
    if prompt.listing == "letters" and prompt.lists_choices:
        words = [letter(i) for i in range(len(words))]
    if len(set(words)) < len(words):
        twice = next(word for word in words if words.count(word) > 1)
        raise InputError(f"two of the choices are said alike, {twice[:60]!r}; give each its own words")
    return Prompted(text, tuple(words), list(choices).index(target))


def listed(prompts: Sequence[Prompt], wanted: bool) -> tuple[Prompt, ...]:
    """Of a choice task, the prompts that list its choices (those that do not get the list in front), or do not.

    The list goes in front so that the template's last words, which ask for the answer, stay last.
    """
    if not wanted:
        return tuple(prompt for prompt in prompts if not prompt.lists_choices)
    front = "Possible answers:\n{{ choices }}\n\n"
    return tuple(p if p.lists_choices else replace(p, template=front + as_jinja(p.template)) for p in prompts)


def version(prompts: Sequence[Prompt]) -> str:
    """12 hex digits that change with anything that changes what is rendered."""
    content = json.dumps([RENDERING, *map(asdict, prompts)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


@cache
def fields(template: str) -> frozenset[str]:
    """The names that a template uses. Raises InputError if it is not Jinja."""
    if not any(mark in template for mark in _JINJA_MARKS):
        return frozenset(_SHORT.findall(template))
    try:
        return frozenset(meta.find_undeclared_variables(_SANDBOX.parse(template)))
    except TemplateError as error:
        raise InputError(f"{_quoted(template)} is no template: {error}") from error


_SHORT = re.compile(r"\{(\w+)\}")


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})  # no template needs them, and 9 ** 9 ** 9 never ends

    def call_binop(self, context, operator, left, right):
        raise SecurityError(f"the operator {operator} is unsafe")


_SANDBOX = _Sandbox(undefined=StrictUndefined, keep_trailing_newline=True)
_SANDBOX.globals.clear()  # of Jinja's own: range, lipsum, cycler ...


def as_jinja(template: str) -> str:
    return template if any(mark in template for mark in _JINJA_MARKS) else _SHORT.sub(r"{{ \1 }}", template)


@lru_cache(maxsize=4096)
def _compiled(template: str) -> Template:
    return _SANDBOX.from_string(as_jinja(template))


def _render(prompt: Prompt, input: str, words: Sequence[str] | None) -> str:
    data = {"input": input}
    if words is not None:
        data["choices"] = _Choices(words)
        data["choices"].listing = prompt.listing
    try:
        return _compiled(prompt.template).render(data)
    except Exception as error:  # a template is a program of the user's: whatever it raises is its own fault
        raise InputError(f"{_quoted(prompt.template)} cannot be rendered: {error}") from error


def fill(template: str, record: dict) -> str:
    """Words around the fields of a record, `{{ field }}`. Raises InputError for one that it has not."""
    try:
        return _compiled(template).render(record)
    except Exception as error:
        raise InputError(f"{_quoted(template)} cannot be filled from {', '.join(record)}: {error}") from error


def _quoted(template: str) -> str:
    return f"the template {template[:60]!r}"
