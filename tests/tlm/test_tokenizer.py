import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tasks.errors import InputError
from tlm.tokenizer import (
    CLS,
    MASK,
    PAD,
    SEP,
    SPECIALS,
    UNK,
    Encoder,
    cached_tokenizer,
    encode_slowly,
    load_tokenizer,
    sample_evenly,
    save_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)

AWKWARD = [
    "",
    "   ",
    "a\u00a0b\u2003c line\nbreak\ttab\r\nend",
    "\x00nul\x01 in\x1cside\x85 x\u200by",
    "na\u00efve Cafe\u0301 \u00c5NGSTR\u00d6M \u0130stanbul",
    "漢字かな交じり文 and 한국어",
    "[MASK] in[SEP]side [[ head ]] << tail >>,",
    "x" * 101 + " " + "y" * 100,
    "Σίσυφος ΣΑΣ ß ﬁ e\u0301 \u0301e",
    "_under_score__ 3.14 #tag @user https://a.b/c?d=e&f",
    "\u202eright to left\u202c \ufeffbom \ufffd \U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7",
]
PIECES = [*SPECIALS, "[", "]", " ", "The", "re-Do", "\x1f", "\u00e9", "ﬀ", "\u0345"]


@pytest.fixture(scope="module")
def texts(real_text) -> list[str]:
    return real_text[:600] + ["we compare [[ the parser ]] with << a grammar >>"] * 20 + AWKWARD


@pytest.fixture(scope="module")
def tokenizer(texts) -> Tokenizer:
    return train_tokenizer(texts, 1200)


def test_special_tokens_come_first_and_the_template_adds_them(tokenizer):
    assert [tokenizer.token_to_id(token) for token in SPECIALS] == [PAD, UNK, CLS, SEP, MASK] == list(range(5))
    assert tokenizer.encode("the class").ids[0] == CLS
    assert tokenizer.encode("the class").tokens[1:] == ["the", "class", "[SEP]"]
    assert tokenizer.get_vocab_size() == 1200
    assert sorted(tokenizer.get_vocab().values()) == list(range(1200))


def test_text_is_folded_and_markers_stay_whole(tokenizer):
    assert tokenizer.encode("[[ The Clàss ]] << objects >>", add_special_tokens=False).tokens == [
        "[[", "the", "class", "]]", "<<", "objects", ">>",
    ]  # fmt: skip


def test_the_same_texts_give_the_same_bytes_in_another_process(texts, tokenizer, tmp_path):
    """The library's own trainer fails this: it breaks ties by a randomly seeded hash map."""
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    code = (
        "import json, sys; from tlm.tokenizer import train_tokenizer;"
        "sys.stdout.buffer.write(train_tokenizer(json.load(open(sys.argv[1])), 1200).to_str().encode())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "texts.json")]
    other = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    assert other == tokenizer.to_str()


def test_fast_encoder_equals_the_library_on_real_and_awkward_text(tokenizer, real_text):
    encoder = Encoder(tokenizer)
    for texts in (real_text[500:1100], AWKWARD, ["".join(AWKWARD), " ".join(AWKWARD)], []):
        for _ in range(2):  # the second time from memory
            assert_same(encoder(texts), encode_slowly(tokenizer, texts))


@settings(deadline=None, max_examples=150)
@given(st.lists(st.lists(st.text(max_size=12) | st.sampled_from(PIECES), max_size=8).map("".join), max_size=4))
def test_fast_encoder_equals_the_library_on_any_text(tokenizer, texts):
    assert_same(Encoder(tokenizer)(texts), encode_slowly(tokenizer, texts))


def test_fast_encoder_forgets_when_full_and_stays_right(tokenizer, real_text):
    encoder = Encoder(tokenizer, max_chunks=50)
    for start in range(0, 100, 10):
        texts = real_text[start : start + 10]
        assert_same(encoder(texts), encode_slowly(tokenizer, texts))


def test_large_vocabulary_needs_wider_ids(texts):
    class Large:  # get_vocab_size is all that decides
        def get_vocab_size(self):
            return 70_000

    assert Encoder(Large()).dtype == np.uint32
    assert Encoder(train_tokenizer(texts, 700)).dtype == np.uint16


def test_cache_trains_once_and_loads_the_same(texts, tokenizer, tmp_path):
    first = cached_tokenizer(tmp_path, "key", texts, 1200)
    again = cached_tokenizer(tmp_path, "key", ["never read"], 1200)
    assert first.to_str() == again.to_str() == tokenizer.to_str()
    assert tokenizer_hash(first) == tokenizer_hash(tokenizer)
    assert tokenizer_hash(cached_tokenizer(tmp_path, "other", texts[:300], 1200)) != tokenizer_hash(first)
    assert all(path.suffix == ".json" for path in tmp_path.iterdir())


def test_even_sample_is_a_stride():
    texts = [f"{i:04d}" for i in range(1000)]
    assert sample_evenly(iter(texts), 4000) == texts
    assert sample_evenly(iter(texts), 3999) == texts[::2]
    assert sample_evenly(iter(texts), 1000) == texts[::4]
    assert sample_evenly(["long" * 100, "b"], 3) == ["long" * 100]


@pytest.mark.parametrize("texts", [[], ["", "  \n"]])
def test_blank_text_is_an_input_error(texts):
    with pytest.raises(InputError, match="blank"):
        train_tokenizer(texts, 1000)


def test_vocabulary_too_small_is_an_input_error(texts):
    with pytest.raises(InputError, match="vocabulary of 40"):
        train_tokenizer(["abcdefghij klmnopqrst uvwxyz"] * 3 + texts, 40)


def test_bad_files_are_input_errors(tmp_path, tokenizer):
    with pytest.raises(InputError, match="No tokenizer"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text(tokenizer.to_str()[:500])
    with pytest.raises(InputError, match="not a readable"):
        load_tokenizer(tmp_path / "cut.json")
    from tokenizers import models

    save_tokenizer(Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")), tmp_path / "other.json")
    with pytest.raises(InputError, match="does not start with"):
        load_tokenizer(tmp_path / "other.json")


def assert_same(fast, slow):
    np.testing.assert_array_equal(fast[1], slow[1])
    np.testing.assert_array_equal(fast[0], slow[0])
    assert fast[0].dtype == slow[0].dtype
    assert fast[1].dtype == slow[1].dtype
