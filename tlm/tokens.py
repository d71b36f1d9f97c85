"""Tokenized texts on disk: each text is tokenized once, and training maps the ids into memory.

A store is a folder: `tokens.bin` holds the ids of all texts end to end (uint16, or uint32 for large vocabularies),
`offsets.npy` where each begins (int64[texts + 1]), `manifest.json` what it is made of. Special tokens are not stored:
what a text is cut into, and where [CLS] and [SEP] go, is decided by the maximum length of a run, not by the store.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tasks.errors import InputError
from tlm.tokenizer import CLS, SEP, Encoder, id_dtype, tokenizer_hash

VERSION = 1
BATCH_TEXTS = 2000  # texts encoded at a time


@dataclass(frozen=True)
class TokenStore:
    """N texts of T tokens together. `tokens`: uint16 or uint32[T], mapped; `offsets`: int64[N + 1]."""

    folder: Path
    tokens: np.ndarray
    offsets: np.ndarray
    manifest: dict

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def sequence(self, i: int) -> np.ndarray:
        """The ids of text `i`, without special tokens."""
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]


@dataclass(frozen=True)
class Passages:
    """Pieces of a store as a model reads them: [CLS] piece [SEP]. `lengths` (int64[n]) count these two."""

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def sequence(self, i: int) -> np.ndarray:
        """int64[lengths[i]]"""
        out = np.empty(self.lengths[i], np.int64)
        out[0], out[-1] = CLS, SEP
        out[1:-1] = self.tokens[self.starts[i] : self.starts[i] + self.lengths[i] - 2]
        return out


def windows(store: TokenStore, max_length: int) -> Passages:
    """Every token of the store, in pieces of at most `max_length - 2` tokens that do not cross texts.

    A text that is too long is cut into as few pieces as can be, of equal size (give or take one token), so that nothing
    is thrown away and no piece is a mere stub. Empty texts give none.
    """
    room = max_length - 2
    sizes = np.diff(store.offsets)
    pieces = -(-sizes // room)
    text = np.repeat(np.arange(len(store)), pieces)
    nth = np.arange(len(text)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begins = sizes[text] * nth // pieces[text]
    ends = sizes[text] * (nth + 1) // pieces[text]
    return Passages(store.tokens, store.offsets[text] + begins, ends - begins + 2)


def heads(store: TokenStore, max_length: int) -> tuple[Passages, int]:
    """(One passage a text, its first `max_length - 2` tokens; how many texts were cut)."""
    sizes = np.diff(store.offsets)
    kept = np.minimum(sizes, max_length - 2)
    return Passages(store.tokens, store.offsets[:-1], kept + 2), int((kept < sizes).sum())


def cached_tokens(
    cache: Path, key: str, texts: Iterable[str], tokenizer: Tokenizer, progress: Callable[[int], None] | None = None
) -> TokenStore:
    """The store of `texts` under this tokenizer, kept in `cache`. `key` names the texts (a fingerprint); on a hit they
    are not iterated. `progress` is called with the number of texts done.
    """
    identity = {"version": VERSION, "tokenizer": tokenizer_hash(tokenizer), "texts_key": key}
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache / f"tokens-{name}"
    if (folder / "manifest.json").exists():
        return open_store(folder)
    return encode_to(folder, texts, tokenizer, identity, progress)


def encode_to(
    folder: Path,
    texts: Iterable[str],
    tokenizer: Tokenizer,
    about: dict | None = None,
    progress: Callable[[int], None] | None = None,
) -> TokenStore:
    """Tokenize `texts` into a store at `folder`, whole or not at all; texts are held a batch at a time.

    `about` goes into the manifest. If another process has finished the same folder meanwhile, its store is kept.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        offsets = [np.zeros(1, np.int64)]
        encode = Encoder(tokenizer)
        with (temporary / "tokens.bin").open("wb") as file:
            for done, batch in batches(texts):
                ids, lengths = encode(batch)
                file.write(ids)
                offsets.append(offsets[-1][-1] + np.cumsum(lengths))
                if progress:
                    progress(done)
            flush(file)
        starts = np.concatenate(offsets)
        with (temporary / "offsets.npy").open("wb") as file:
            np.save(file, starts)
            flush(file)
        manifest = {
            **(about or {}),
            "dtype": np.dtype(id_dtype(tokenizer)).name,
            "texts": len(starts) - 1,
            "tokens": int(starts[-1]),
        }
        with (temporary / "manifest.json").open("w") as file:
            json.dump(manifest, file, indent=1)
            flush(file)
        if (folder / "manifest.json").exists():
            return open_store(folder)
        shutil.rmtree(folder, ignore_errors=True)  # without a manifest it is a wreck
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_store(folder)


def open_store(folder: Path) -> TokenStore:
    """Map a finished store. Raises InputError if files are missing or disagree with the manifest."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        offsets = np.load(folder / "offsets.npy")
        path, dtype, total = folder / "tokens.bin", np.dtype(manifest["dtype"]), manifest["tokens"]
        found = path.stat().st_size // dtype.itemsize, len(offsets) - 1, offsets[-1]
        if found != (total, manifest["texts"], total):
            raise ValueError("sizes differ from the manifest")
        tokens = np.memmap(path, dtype, "r") if total else np.empty(0, dtype)
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"{folder} is not a whole token store ({error}); delete it to have it made anew.") from error
    return TokenStore(folder, tokens, offsets, manifest)


def batches(texts: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """(number of texts so far, the next BATCH_TEXTS texts)"""
    stream, done = iter(texts), 0
    while batch := list(islice(stream, BATCH_TEXTS)):
        done += len(batch)
        yield done, batch


def flush(file) -> None:
    file.flush()
    os.fsync(file.fileno())
