"""Prompts: what a template sees and must not see, how choices are listed, how answers are said."""

import jinja2
import pytest

from tasks.errors import InputError
from tasks.prompts import Prompt, letter, listed, read_prompt, render, version

CHOICES = ["good", "bad", "so-so"]


def text_of(template, choices=CHOICES, **how):
    return render(read_prompt({"template": template, **how}), "Nice film.", "bad" if choices else "42", choices).text


def test_short_form_and_jinja_say_the_same():
    assert text_of("{input} Which?\n{choices}\n") == "Nice film. Which?\n- good\n- bad\n- so-so\n"
    assert text_of("{{ input }} Which?\n{{ choices }}\n") == text_of("{input} Which?\n{choices}\n")
    loop = "{% for choice in choices %}[{{ choice | upper }}]{% endfor %}{{ choices | length }}{{ choices[0] }}"
    assert text_of(loop) == "[GOOD][BAD][SO-SO]3good"


def test_braces_that_are_no_field_stay():
    assert text_of('Answer as {"label": ...} or {}: {input}') == 'Answer as {"label": ...} or {}: Nice film.'


def test_data_is_never_a_template():
    hostile = "{{ 7 * 7 }} {choices} {% raw %}"
    rendered = render(read_prompt("Say: {input} / {choices}"), hostile, "{{ 1 }}", ["{{ 1 }}", "{input}"])
    assert rendered.text == f"Say: {hostile} / - {{{{ 1 }}}}\n- {{input}}"


@pytest.mark.parametrize(
    ("listing", "expected"),
    [("lines", "- good\n- bad\n- so-so"), ("commas", "good, bad or so-so"), ("letters", "A. good\nB. bad\nC. so-so")],
)
def test_listings(listing, expected):
    assert text_of("{choices}", listing=listing) == expected
    assert text_of("{choices}", choices=["bad"], listing="commas") == "bad"


def test_answers_are_verbalised():
    prompt = read_prompt({"template": "{input}: {choices}", "listing": "commas", "answers": {"bad": "thumbs down"}})
    rendered = render(prompt, "x", "bad", CHOICES)
    assert rendered == ("x: good, thumbs down or so-so", ("good", "thumbs down", "so-so"), 1)
    assert render(read_prompt("{input}"), "6 x 7", "42", None) == ("6 x 7", ("42",), 0)


def test_letters_are_the_answer_only_where_the_template_lists_them():
    said = [render(Prompt(t, "letters"), "x", "so-so", CHOICES) for t in ("{input} {choices}", "{input}")]
    assert [(p.answers, p.gold) for p in said] == [(("A", "B", "C"), 2), (tuple(CHOICES), 2)]
    assert [letter(i) for i in (0, 25, 26, 51, 52, 701, 702)] == ["A", "Z", "AA", "AZ", "BA", "ZZ", "AAA"]


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{inputs}", "unknown field 'inputs'"),
        ("{{ input }} {{ labels }}", "unknown field 'labels'"),
        ("{{ range(3) }}", "unknown field 'range'"),
        ("{{ input.__class__.__mro__ }}", "unsafe"),
        ("{{ input | attr('__class__') }}", "unsafe"),
        ("{{ '{0.__class__}'.format(input) }}", "unsafe"),
        ("{{ self._TemplateReference__context }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ 9 ** 9 ** 9 }}", "unsafe"),
        ("{{ 'ha' * 1000000000000 }}", "unsafe"),
        ("{{ input.nothing }}", "no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for c in choices %}", "no template"),
    ],
)
def test_templates_that_are_refused_when_they_are_read(template, named):
    with pytest.raises(InputError, match=named):
        read_prompt(template)


def test_what_a_trial_does_not_reach_is_refused_when_it_is_rendered():
    prompt = read_prompt("{% if input == 'now' %}{{ input.__class__ }}{% endif %}")
    assert render(prompt, "later", "42", None).text == ""
    with pytest.raises(InputError, match="unsafe"):
        render(prompt, "now", "42", None)


def test_the_same_template_does_reach_out_without_the_sandbox():
    assert "class" in jinja2.Template("{{ input.__class__.__mro__ }}").render(input="x")


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (3, "a prompt is a template"),
        ({"template": "{input}", "answer": {}}, "no key 'answer'"),
        ({"template": "{input}", "listing": "rows"}, "listing 'rows'"),
        ({"template": "{input}", "answers": {"a": 1}}, "answers"),
    ],
)
def test_prompts_that_are_no_prompts(value, named):
    with pytest.raises(InputError, match=named):
        read_prompt(value)


def test_choices_that_could_not_be_told_apart():
    with pytest.raises(InputError, match="said alike, 'bad'"):
        render(read_prompt({"template": "{input}", "answers": {"so-so": "bad"}}), "x", "bad", CHOICES)
    with pytest.raises(InputError, match="'great' is none of its choices"):
        render(read_prompt("{input}"), "x", "great", CHOICES)
    with pytest.raises(InputError, match="'choices' is undefined"):
        render(read_prompt("{choices}"), "x", "great", None)


def test_listed_or_not():
    prompts = [read_prompt("{input} It is"), read_prompt("{{ input }} {{ choices }}")]
    assert listed(prompts, False) == (prompts[0],)
    both = listed(prompts, True)
    assert both[1] == prompts[1]
    assert render(both[0], "x", "bad", CHOICES).text == "Possible answers:\n- good\n- bad\n- so-so\n\nx It is"


def test_a_version_changes_with_what_is_rendered():
    same = [version([read_prompt("{input}"), read_prompt("{choices}")]) for _ in range(2)]
    others = [
        version([read_prompt("{input}")]),
        version([read_prompt("{choices}"), read_prompt("{input}")]),
        version([read_prompt("{input}"), read_prompt({"template": "{choices}", "listing": "letters"})]),
        version([read_prompt("{input}"), read_prompt({"template": "{choices}", "answers": {"a": "b"}})]),
    ]
    assert same[0] == same[1]
    assert len({same[0], *others}) == 5
