"""The tokenizer of a run: WordPiece trained on the run's own text, and a fast way to apply it.

The vocabulary is learnt from the selection and the task's training text, so that a domain's words are single tokens
while the vocabulary (and the head with it) stays small. Punctuation runs are words of their own, so that a task's
markers such as `[[`, `]]`, `<<`, `>>` come through whole.

Two things are ours around the `tokenizers` library. Its WordPiece trainer breaks ties by the order of a randomly seeded
hash map; `train_tokenizer` takes that freedom away. And its encoder does the same words again and again; `Encoder` asks
it once for each distinct chunk of text and remembers, which takes a third of the time.
"""

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tasks.errors import InputError
from tlm.run import write_text

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(5)  # every tokenizer of ours starts with these; load_tokenizer checks it
VERSION = 1  # part of the cache key; raise it when the same text would give another vocabulary
# 20 MB train in 6 s. Ten times as much gives 94% of the same tokens at 8k, another sample of 20 MB 93%.
SAMPLE_BYTES = 20_000_000

_ASCII_WORDS = re.compile(r"[a-z0-9_]+|[^a-z0-9_]+")  # the cutter's \w+|[^\w\s]+ on a lower-cased chunk of ASCII


def train_tokenizer(texts: Iterable[str], vocabulary: int, max_bytes: int = SAMPLE_BYTES) -> Tokenizer:
    """A lower-casing WordPiece tokenizer of at most `vocabulary` tokens, the same byte for byte for the same texts.

    Texts are lower-cased and stripped of accents and control characters (BERT's normalizer), then cut into runs of word
    characters and runs of punctuation. Where the texts are larger than `max_bytes` an even sample of them is used.
    Raises InputError if the texts hold too little to learn from, or `vocabulary` cannot hold the alphabet.
    """
    sample = sample_evenly(texts, max_bytes)
    normalizer, cutter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.Whitespace()
    letters = _alphabet(sample, normalizer, limit=max(128, vocabulary // 16))
    if not letters:
        raise InputError("There is no text to train a tokenizer on: training texts and selection are blank.")
    # The trainer numbers the pieces "##x" in the order of a random hash map, and ties between merges (and for a place
    # in the alphabet) go by it. Given as special tokens, letters and pieces are numbered by us: no chance is left.
    start = [*SPECIALS, *letters, *("##" + letter for letter in letters)]
    if len(start) >= vocabulary:
        raise InputError(f"A vocabulary of {vocabulary} cannot hold its {len(start)} letters and special tokens.")
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = normalizer, cutter
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary, special_tokens=start, limit_alphabet=0, show_progress=False
    )
    learner.train_from_iterator(sample, trainer)

    tokenizer = Tokenizer(models.WordPiece(learner.get_vocab(), unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, cutter
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return tokenizer


def cached_tokenizer(cache: Path, key: str, texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """`train_tokenizer`, kept in `cache`; `key` names what the texts are (fingerprints). Not iterated on a hit."""
    name = hashlib.sha256(f"{VERSION}/{vocabulary}/{SAMPLE_BYTES}/{key}".encode()).hexdigest()[:16]
    path = cache / f"tokenizer-{name}.json"
    if not path.exists():
        save_tokenizer(train_tokenizer(texts, vocabulary), path)
    return load_tokenizer(path)


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write tokenizer.json in the library's own format, whole or not at all."""
    write_text(path, tokenizer.to_str(pretty=True))


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json of ours. Raises InputError if it is missing, broken or has other special tokens."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"No tokenizer at {path}: give a run whose model folder is complete.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{path} is not a readable tokenizer.json ({error}); make it anew.") from error
    if tuple(tokenizer.id_to_token(i) for i in range(len(SPECIALS))) != SPECIALS:
        raise InputError(f"{path} does not start with the tokens {', '.join(SPECIALS)}; use one trained by tlm.")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def own_tokenizer(path: Path, vocabulary: int, sha256: str | None) -> Tokenizer:
    """The tokenizer that a model of `vocabulary` tokens was trained with, whose hash is `sha256` where it was noted.

    Raises InputError if another one lies there: its ids would mean other words.
    """
    tokenizer = load_tokenizer(path)
    size = tokenizer.get_vocab_size()
    if size != vocabulary:
        raise InputError(
            f"{path}: has {size} tokens, the model {vocabulary}; give the tokenizer that the model was trained with"
        )
    if sha256 and tokenizer_hash(tokenizer) != sha256:
        raise InputError(
            f"{path}: is not the tokenizer that the model was trained with (sha256 {tokenizer_hash(tokenizer)[:12]}, "
            f"not {sha256[:12]}); restore it"
        )
    return tokenizer


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """sha256 of all that decides how it cuts."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def sample_evenly(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Every n-th text, n the smallest power of two that brings them under `max_bytes` (UTF-8), in one pass.

    At least one text is kept, however long.
    """
    kept: list[str] = []
    sizes: list[int] = []
    stride, total = 1, 0
    for i, text in enumerate(texts):
        if i % stride:
            continue
        kept.append(text)
        sizes.append(len(text.encode("utf-8", "replace")))
        total += sizes[-1]
        while total > max_bytes and len(kept) > 1:
            kept, sizes, stride = kept[::2], sizes[::2], stride * 2
            total = sum(sizes)
    return kept


def _alphabet(texts: list[str], normalizer: normalizers.Normalizer, limit: int) -> list[str]:
    """The characters to know, sorted: those seen at least once in a million, the most frequent `limit` of them."""
    raw: Counter[str] = Counter()
    for text in texts:
        raw.update(text)
    counts: Counter[str] = Counter()
    for character, count in raw.items():
        for plain in normalizer.normalize_str(character).split():
            for letter in plain:
                counts[letter] += count
    floor = counts.total() / 1e6
    ranked = sorted((letter for letter in counts if counts[letter] >= floor), key=lambda x: (-counts[x], x))
    return sorted(ranked[:limit])


def encode_slowly(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The library alone: (ids of all texts one after the other, number of ids of each text); no specials added."""
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    lengths = np.array([len(e.ids) for e in encodings], np.int64)
    return np.array([i for e in encodings for i in e.ids], id_dtype(tokenizer)), lengths


def id_dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    """The smallest type that holds every id."""
    return np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32


class Encoder:
    """Encodes many texts; equal to `encode_slowly` on every text. 20 MB take 2.4 s, the library alone 7.1 s.

    A space is a border to the normalizer, to the cutter and to the model alike, so a text's ids are those of its
    space-separated chunks, joined. (No other character is used to split: Python and the library disagree on what white
    space is.) Each distinct chunk is worked out once; its ids are kept as bytes, and joining bytes is all that is left.
    """

    def __init__(self, tokenizer: Tokenizer, max_chunks: int = 1_000_000):
        """`max_chunks` bounds the memory (about 170 bytes a chunk): the table starts anew when it is full."""
        self.tokenizer, self.dtype, self.max_chunks = tokenizer, np.dtype(id_dtype(tokenizer)), max_chunks
        self._chunks: dict[str, bytes] = {}
        self._words: dict[str, bytes] = {}

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts one after the other, number of ids of each text int64[len(texts)]); no specials added."""
        chunks = [text.split(" ") for text in texts]
        self._learn(chunks)
        lookup = self._chunks.__getitem__
        encoded = [b"".join(map(lookup, row)) for row in chunks]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded)) // self.dtype.itemsize
        return np.frombuffer(b"".join(encoded), self.dtype), lengths

    def _learn(self, chunks: list[list[str]]) -> None:
        """Enter the new chunks. Printable ASCII is cut here, and the model sees each new word once (20 MB of text hold
        270,000 chunks but 105,000 words); anything else, and what may hold a special token, goes through the library.
        """
        if len(self._chunks) > self.max_chunks:
            self._chunks, self._words = {}, {}
        wanted: set[str] = set()
        for row in chunks:
            wanted.update(row)
        wanted.difference_update(self._chunks)
        others, word_bytes = [], self._words
        for chunk in wanted:
            if not (chunk.isascii() and chunk.isprintable()) or "[" in chunk:
                others.append(chunk)
                continue
            words = _ASCII_WORDS.findall(chunk.lower())
            for word in words:
                if word not in word_bytes:
                    word_bytes[word] = self._bytes([token.id for token in self.tokenizer.model.tokenize(word)])
            self._chunks[chunk] = b"".join([word_bytes[word] for word in words])
        encodings = self.tokenizer.encode_batch_fast(others, add_special_tokens=False)
        self._chunks.update((chunk, self._bytes(e.ids)) for chunk, e in zip(others, encodings, strict=True))

    def _bytes(self, ids: list[int]) -> bytes:
        return array(self.dtype.char, ids).tobytes()
