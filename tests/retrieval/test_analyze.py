from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.analyze import ANALYZERS
from retrieval.vocabulary import Vocabulary

MIXED = st.text(st.sampled_from("abAZ09_-' .\n\té\u0130ßΣ中\u0301\u00a0"), max_size=30)


def decoded(vocabulary: Vocabulary, texts: list[str]) -> list[list[str]]:
    ids, ends = vocabulary.encode(text.encode() for text in texts)
    return [[vocabulary.term(id) for id in ids[start:end]] for start, end in pairwise(ends)]


def test_terms():
    text = "The naïve don't-care_case of 3.14: ΣΑΣ, 東京 and ﬁ!"
    assert " ".join(ANALYZERS["words"].terms(text)) == "the naïve don t care case of 3 14 σας 東京 and ﬁ"
    assert " ".join(ANALYZERS["english"].terms(text)) == "naïve don t care case 3 14 σας 東京 ﬁ"
    assert len(ANALYZERS["english"].stop_words) == 33


def test_hash_tells_analyzers_apart():
    assert ANALYZERS["words"].hash != ANALYZERS["english"].hash


@pytest.mark.parametrize("name", ANALYZERS)
@settings(deadline=None)
@given(texts=st.lists(st.one_of(MIXED, st.text(max_size=20), st.just("the of"), st.just("")), max_size=6))
def test_vocabulary_splits_as_the_analyzer(name, texts):
    analyzer = ANALYZERS[name]
    assert decoded(Vocabulary(analyzer), texts) == [analyzer.terms(text) for text in texts]


@pytest.mark.parametrize("name", ANALYZERS)
def test_vocabulary_on_real_text_grows_saves_and_finds(name, real_text, tmp_path):
    analyzer, vocabulary = ANALYZERS[name], Vocabulary(ANALYZERS[name])
    expected = [analyzer.terms(text) for text in real_text]
    half = len(real_text) // 2
    assert decoded(vocabulary, real_text[:half]) + decoded(vocabulary, real_text[half:]) == expected
    distinct = list({term: None for terms in expected for term in terms})
    assert len(vocabulary) == len(distinct)
    assert [vocabulary.term(i) for i in range(len(vocabulary))] == distinct  # numbered as they came

    vocabulary.save(tmp_path)
    loaded = Vocabulary.load(tmp_path, analyzer)
    assert loaded.ids(distinct).tolist() == list(range(len(distinct)))
    unknown = ["qzxqzx", "two words", "", "Capital", "é"]
    assert loaded.ids(unknown).tolist() == [-1] * 5
    assert (loaded.ids(sorted(analyzer.stop_words)) == -1).all()
    assert len(loaded) == len(distinct)  # looking up adds nothing


def test_vocabulary_holds_many_terms_of_one_text():
    text = " ".join(f"t{i}" for i in range(50_000))
    vocabulary = Vocabulary(ANALYZERS["words"])
    ids, ends = vocabulary.encode([b"before", text.encode(), b"t49999"])
    assert ends.tolist() == [0, 1, 50_001, 50_002]
    assert np.array_equal(ids, [*range(50_001), 50_000])
    assert vocabulary.term(50_000) == "t49999"
