"""Genes of prompts: nothing is lost in taking apart, and whatever comes of them can be rendered."""

import random

import pytest

from tasks.genes import FORMS, Genes, begin, crossover, express, genes_of, mutate
from tasks.prompts import Prompt, read_prompt, render

TEMPLATES = [
    "{input}\nWhat is it?",
    "Topic of: {input}\n{choices}\nAnswer:",
    "{{ choices }} or {{ 'not {' }}: {{input}}",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("answers", [{}, {"a": "the first"}])
def test_what_is_taken_apart_says_the_same(template, answers):
    prompt = Prompt(template, "commas", answers)
    whole = express(genes_of(prompt), ("a", "b"))
    assert render(whole, "some {text}", "b", ("a", "b")) == render(prompt, "some {text}", "b", ("a", "b"))


def test_a_program_has_no_genes():
    for template in ("{% for c in choices %}{{ c }}{% endfor %}{{ input }}", "{{ input }} {{ input }}", "{choices}"):
        assert genes_of(Prompt(template)) is None
    (only,) = begin([Prompt("{choices}")], 1, random.Random(0))
    assert render(express(only, ("a", "b")), "x", "a", ("a", "b")).text == "x\n"


def test_answers_are_said_otherwise_unless_they_would_be_alike():
    genes = Genes("", "\n", form="capital", synonym=1)
    assert render(express(genes, ("yes", "no")), "x", "no", ("yes", "no")).answers == ("True", "False")
    assert render(express(genes, ("yes", "blue")), "x", "yes", ("yes", "blue")).answers == ("True", "Blue")
    assert render(express(genes, ("yes", "true", "Yes")), "x", "yes", ("yes", "true", "Yes")).answers[0] == "yes"
    assert [form("it is") for form in FORMS.values()] == ["it is", "it is", "It is", "It is."]


def test_whatever_comes_of_them_is_a_prompt():
    rng = random.Random(0)
    found = begin([Prompt(template) for template in TEMPLATES], 30, rng)
    assert found[:3] == [genes_of(Prompt(template)) for template in TEMPLATES]
    assert len(set(found)) == 30
    for _ in range(300):
        child = mutate(crossover(rng.choice(found), rng.choice(found), rng), rng)
        read_prompt({"template": child.template, "listing": child.listing})
        prompted = render(express(child, ("yes", "no")), "some text", "no", ("yes", "no"))
        assert "some text" in prompted.text
        assert len(set(prompted.answers)) == 2
        assert genes_of(Prompt(child.template, child.listing)) is not None  # its choices stand there once at most
        found.append(child)
    again = begin([Prompt(template) for template in TEMPLATES], 30, random.Random(0))
    assert again == found[:30]  # a seed's draws are its own


def test_a_child_has_each_gene_from_a_parent():
    one, other = Genes("a ", " b", "lines", "lower", 1), Genes("c ", " d", "letters", "capital", 2)
    for seed in range(20):
        child = crossover(one, other, random.Random(seed))
        assert all(getattr(child, name) in (getattr(one, name), getattr(other, name)) for name in vars(child))
