"""Prompts as genes, for those who want many of them: genetic search, and votes of many imperfect prompts.

A template falls into what stands before the input and what stands after it; how choices are listed and how they are
said are genes of their own. Crossover takes each gene from one of two parents; a mutation changes one gene, by a frame
out of stock, by a sentence less (Prasad et al. 2022, arXiv 2203.07281), or by other words for the answers (verbalisers:
Schick and Schuetze 2021, arXiv 2001.07676). No language model is asked for paraphrases.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tasks.prompts import LISTINGS, Prompt, as_jinja

BEFORE = ("", "Text: ", "Question: ", "Input: ", "Read this:\n", "Consider the following.\n")
AFTER = ("\n", "\nAnswer:", "\nThe answer is", "\nOutput:", "\nWhat is the answer?\n", "\nSo the right answer is")
LISTED = "Possible answers:\n{{ choices }}\n\n"
FORMS: dict[str, Callable[[str], str]] = {
    "as it is": lambda words: words,
    "lower": str.lower,
    "capital": lambda words: words[:1].upper() + words[1:],
    "sentence": lambda words: words[:1].upper() + words[1:] + ("" if words[-1:] in ".!?" else "."),
}
SYNONYMS = {
    "yes": ("true", "correct", "right"), "no": ("false", "incorrect", "wrong"),
    "true": ("yes", "correct", "right"), "false": ("no", "incorrect", "wrong"),
    "correct": ("yes", "true", "right"), "incorrect": ("no", "false", "wrong"),
    "maybe": ("perhaps", "unclear", "it is not clear"), "neutral": ("maybe", "unclear", "so so"),
    "positive": ("good", "great", "favourable"), "negative": ("bad", "terrible", "unfavourable"),
    "entailment": ("yes", "true", "it follows"), "contradiction": ("no", "false", "it cannot be"),
    "acceptable": ("correct", "yes", "good"), "unacceptable": ("incorrect", "no", "bad"),
    "similar": ("yes", "alike", "the same"), "different": ("no", "unlike", "not the same"),
}  # fmt: skip
_INPUT, _CHOICES = re.compile(r"\{\{\s*input\s*\}\}"), re.compile(r"\{\{\s*choices\s*\}\}")
_SENTENCE = re.compile(r"[^.!?\n]*[.!?\n]+\s*")


@dataclass(frozen=True)
class Genes:
    """before, after: Jinja around the input; either may list the choices. form: of FORMS; synonym: 0 is none. answers:
    (choice, words) of the prompt that it comes from."""

    before: str
    after: str
    listing: str = "lines"
    form: str = "as it is"
    synonym: int = 0
    answers: tuple[tuple[str, str], ...] = ()

    @property
    def template(self) -> str:
        return f"{self.before}{{{{ input }}}}{self.after}"


def genes_of(prompt: Prompt) -> Genes | None:
    """None where the template is more than words around one input, and has no such genes."""
    parts = _INPUT.split(as_jinja(prompt.template))
    if len(parts) != 2 or "{%" in prompt.template or len(_CHOICES.findall("".join(parts))) > 1:
        return None
    return Genes(*parts, prompt.listing, answers=tuple(prompt.answers.items()))


def express(genes: Genes, choices: Sequence[str]) -> Prompt:
    """The prompt for an instance with these choices; two that would be said alike are said as they are."""
    own = dict(genes.answers)
    said = {choice: FORMS[genes.form](synonym(own.get(choice, choice), genes.synonym)) for choice in choices}
    distinct = len(set(said.values())) == len(said)
    return Prompt(genes.template, genes.listing, said if distinct else own)


def synonym(choice: str, number: int) -> str:
    words = (choice, *SYNONYMS.get(choice.strip().lower(), ()))
    return words[number] if number < len(words) else choice


def crossover(one: Genes, other: Genes, rng: random.Random) -> Genes:
    """Each gene from either parent; choices that would be listed twice are listed after the input."""
    child = Genes(*(getattr(rng.choice((one, other)), name) for name in vars(one)))
    if _CHOICES.search(child.before) and _CHOICES.search(child.after):
        child = replace(child, before=child.before.replace(LISTED, ""))
        if _CHOICES.search(child.before):
            child = replace(child, before=one.before if not _CHOICES.search(one.before) else "")
    return child


def mutate(genes: Genes, rng: random.Random) -> Genes:
    """With one gene changed."""
    changed = genes
    while changed == genes:
        changed = rng.choice((_before, _after, _shorter, _listing, _form, _synonym))(genes, rng)
    return changed


def _before(genes: Genes, rng: random.Random) -> Genes:
    return replace(genes, before=rng.choice(BEFORE))


def _after(genes: Genes, rng: random.Random) -> Genes:
    return replace(genes, after=rng.choice(AFTER))


def _shorter(genes: Genes, rng: random.Random) -> Genes:
    name = rng.choice(("before", "after"))
    sentences = [found for found in _SENTENCE.finditer(getattr(genes, name)) if "{{" not in found.group()]
    if not sentences:
        return genes
    found, text = rng.choice(sentences), getattr(genes, name)
    return replace(genes, **{name: text[: found.start()] + text[found.end() :]})


def _listing(genes: Genes, rng: random.Random) -> Genes:
    """Listed otherwise, or from now on, or no longer."""
    if not _CHOICES.search(genes.template):
        return replace(genes, before=LISTED + genes.before, listing=rng.choice(list(LISTINGS)))
    if genes.before.startswith(LISTED) and rng.random() < 0.5:
        return replace(genes, before=genes.before.removeprefix(LISTED))
    return replace(genes, listing=rng.choice(list(LISTINGS)))


def _form(genes: Genes, rng: random.Random) -> Genes:
    return replace(genes, form=rng.choice(list(FORMS)))


def _synonym(genes: Genes, rng: random.Random) -> Genes:
    return replace(genes, synonym=rng.randrange(4))


def begin(prompts: Sequence[Prompt], number: int, rng: random.Random) -> list[Genes]:
    """`number` different ones: those of the prompts, as many as there are, and then mutations of them."""
    found = dict.fromkeys(genes for prompt in prompts if (genes := genes_of(prompt)))
    found = found or {Genes(BEFORE[0], AFTER[0]): None}
    own = list(found)[:number]
    while len(found) < number:
        found[mutate(rng.choice(list(found)), rng)] = None
    return [*own, *[genes for genes in found if genes not in own][: number - len(own)]]
