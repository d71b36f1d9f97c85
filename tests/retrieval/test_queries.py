import pytest

from retrieval.analyze import ANALYZERS
from retrieval.queries import key_phrases, make_queries

# The worked example of Rose et al. 2010, section 1.2, with the scores of its figure 1.4.
ABSTRACT = """Compatibility of systems of linear constraints over the set of natural numbers.
Criteria of compatibility of a system of linear Diophantine equations, strict inequations, and nonstrict inequations
are considered. Upper bounds for components of a minimal set of solutions and algorithms of construction of minimal
generating sets of solutions for all types of systems are given. These criteria and the corresponding algorithms for
constructing a minimal supporting set of solutions can be used in solving all the considered types of systems and
systems of mixed types.
"""
STOPS = frozenset({"of", "over", "the", "a", "and", "are", "for", "all", "these", "can", "be", "used", "in", "given"})
BEST = [
    "minimal generating sets", "linear diophantine equations", "minimal supporting set", "minimal set",
    "linear constraints",
]  # fmt: skip


def test_key_phrases_of_the_paper():
    assert [" ".join(phrase) for phrase in key_phrases(ABSTRACT, STOPS)[:5]] == BEST


def test_phrases_end_at_marks_and_stop_words_but_not_at_line_ends():
    phrases = key_phrases("alpha beta, gamma\ndelta of epsilon", frozenset({"of"}))
    assert phrases == [("alpha", "beta"), ("gamma", "delta"), ("epsilon",)]


@pytest.mark.parametrize("name", ANALYZERS)
def test_short_texts_query_whole_and_long_ones_by_key_terms(name):
    analyzer = ANALYZERS[name]
    short, long = "the cat sat", ABSTRACT
    queries = make_queries([short, long, "", "!?"], analyzer, 12)
    assert queries[0] == analyzer.terms(short)
    assert queries[1][:3] == ["minimal", "generating", "sets"]
    assert len(queries[1]) == 12
    assert queries[2:] == [[], []]
    assert make_queries([long], analyzer, 1000) == [analyzer.terms(long)]


def test_long_text_of_stop_words_is_not_lost():
    assert make_queries(["the " * 30], ANALYZERS["words"], 5) == [["the"] * 5]
