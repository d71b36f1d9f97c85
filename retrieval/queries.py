"""Training texts to queries: the whole text, or its key terms where it is long.

Key terms are RAKE's: Rose, Engel, Cramer and Cowley, "Automatic keyword extraction from individual documents", 2010.
The TLM paper does the same for its long texts. Only training texts may query, never dev or test ones.
"""

import re
from collections import Counter

from retrieval.analyze import Analyzer

WORD_OR_MARK = re.compile(r"[^\W_]+|[^\w\s]")  # a punctuation mark ends a phrase, white space does not


def make_queries(texts: list[str], analyzer: Analyzer, max_terms: int) -> list[list[str]]:
    """One list of at most `max_terms` terms for each text, in the texts' order; empty for a text without any."""
    queries = [analyzer.terms(text) for text in texts]
    return [
        terms if len(terms) <= max_terms else _key_terms(text, analyzer, max_terms)
        for text, terms in zip(texts, queries, strict=True)
    ]


def key_phrases(text: str, stop_words: frozenset[str]) -> list[tuple[str, ...]]:
    """The text's distinct phrases (runs of words between stop words and marks), the best first.

    A phrase scores the sum of its words' degree / frequency, where the degree of a word is the summed length of the
    phrases it is in. Phrases with the same score keep the text's order.
    """
    phrases, phrase = [], []
    for token in [*WORD_OR_MARK.findall(text.lower()), "."]:
        if token[0].isalnum() and token not in stop_words:
            phrase.append(token)
        elif phrase:
            phrases.append(tuple(phrase))
            phrase = []
    frequency, degree = Counter(), Counter()
    for phrase in phrases:
        for word in phrase:
            frequency[word] += 1
            degree[word] += len(phrase)
    scores = {phrase: sum(degree[word] / frequency[word] for word in phrase) for phrase in phrases}
    return sorted(scores, key=lambda phrase: -scores[phrase])


def _key_terms(text: str, analyzer: Analyzer, max_terms: int) -> list[str]:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS  # RAKE wants more than the analyzer's 33

    phrases = key_phrases(text, ENGLISH_STOP_WORDS)
    terms = [term for phrase in phrases for term in analyzer.terms(" ".join(phrase))]
    return (terms or analyzer.terms(text))[:max_terms]
