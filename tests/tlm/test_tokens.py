import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import InputError
from tlm import tokens
from tlm.tokenizer import CLS, SEP, train_tokenizer
from tlm.tokens import TokenStore, cached_tokens, encode_to, heads, open_store, windows


@pytest.fixture(scope="module")
def tokenizer(real_text):
    return train_tokenizer(real_text[:400], 900)


@pytest.fixture
def texts(real_text) -> list[str]:
    return [*real_text[:30], "", " \n", *real_text[30:60]]


def store_of(sizes: list[int], tmp_path=None) -> TokenStore:
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return TokenStore(tmp_path, np.arange(10, 10 + offsets[-1], dtype=np.uint16), offsets, {})


def test_store_holds_what_the_library_says(texts, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "BATCH_TEXTS", 7)
    seen = []
    store = encode_to(tmp_path / "s", iter(texts), tokenizer, {"note": "x"}, seen.append)
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert len(store) == len(texts)
    assert [store.sequence(i).tolist() for i in range(len(store))] == expected
    assert len(store.tokens) == sum(map(len, expected)) == store.manifest["tokens"]
    assert store.tokens.dtype == np.uint16
    assert isinstance(store.tokens, np.memmap)
    assert store.manifest["note"] == "x"
    assert seen == [7, 14, 21, 28, 35, 42, 49, 56, 62]


def test_nothing_is_left_of_a_build_that_fails(tokenizer, tmp_path):
    def broken():
        yield "a text"
        raise OSError("the reader fails")

    with pytest.raises(OSError, match="the reader fails"):
        encode_to(tmp_path / "s", broken(), tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_no_texts_give_an_empty_store(tokenizer, tmp_path):
    store = encode_to(tmp_path / "s", [], tokenizer)
    assert len(store) == len(store.tokens) == len(windows(store, 64)) == 0


def test_cache_is_by_texts_and_tokenizer(texts, tokenizer, tmp_path, real_text):
    first = cached_tokens(tmp_path, "key", texts, tokenizer)
    again = cached_tokens(tmp_path, "key", ["not read"], tokenizer)
    assert again.folder == first.folder
    np.testing.assert_array_equal(again.tokens, first.tokens)
    other = train_tokenizer(real_text[:400], 800)
    assert cached_tokens(tmp_path, "key", texts, other).folder != first.folder
    assert cached_tokens(tmp_path, "other", texts, tokenizer).folder != first.folder
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("file", ["tokens.bin", "offsets.npy", "manifest.json"])
def test_a_damaged_store_is_an_input_error(texts, tokenizer, tmp_path, file):
    encode_to(tmp_path / "s", texts, tokenizer)
    path = tmp_path / "s" / file
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="not a whole token store"):
        open_store(tmp_path / "s")
    path.unlink()
    with pytest.raises(InputError, match="not a whole token store"):
        open_store(tmp_path / "s")


def test_a_folder_without_manifest_is_made_anew(texts, tokenizer, tmp_path):
    (encode_to(tmp_path / "s", texts, tokenizer).folder / "manifest.json").unlink()
    assert len(encode_to(tmp_path / "s", texts, tokenizer)) == len(texts)


def test_manifest_that_disagrees_is_an_input_error(texts, tokenizer, tmp_path):
    store = encode_to(tmp_path / "s", texts, tokenizer)
    (tmp_path / "s" / "manifest.json").write_text(json.dumps({**store.manifest, "texts": 3}))
    with pytest.raises(InputError, match="sizes differ"):
        open_store(tmp_path / "s")


@given(st.lists(st.integers(0, 60), max_size=12), st.integers(3, 20))
def test_windows_cover_every_token_once_in_even_pieces(sizes, max_length):
    store = store_of(sizes)
    passages = windows(store, max_length)
    pieces = [passages.sequence(i) for i in range(len(passages))]
    assert [len(piece) for piece in pieces] == passages.lengths.tolist()
    assert all(piece[0] == CLS and piece[-1] == SEP and 3 <= len(piece) <= max_length for piece in pieces)
    assert [t for piece in pieces for t in piece[1:-1]] == store.tokens.tolist()
    text_of = np.searchsorted(store.offsets, passages.starts, "right") - 1
    for i, size in enumerate(sizes):
        lengths = passages.lengths[text_of == i] - 2
        assert lengths.sum() == size
        assert len(lengths) == -(-size // (max_length - 2))
        assert size == 0 or np.ptp(lengths) <= 1


def test_heads_cut_and_count():
    passages, num_cut = heads(store_of([3, 0, 9, 6, 7]), 8)
    assert num_cut == 2
    assert passages.lengths.tolist() == [5, 2, 8, 8, 8]
    assert passages.sequence(0).tolist() == [CLS, 10, 11, 12, SEP]
    assert passages.sequence(1).tolist() == [CLS, SEP]
    assert passages.sequence(2).tolist() == [CLS, 13, 14, 15, 16, 17, 18, SEP]
    assert passages.sequence(2).dtype == np.int64
