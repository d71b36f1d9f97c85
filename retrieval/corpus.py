"""The corpus store: general text as one memory-mapped file, a document by its row.

Any JSON lines, CSV, parquet or text files become a store once; from then on a document is two look-ups away, and memory
does not grow with the text. Rows follow the files and their lines, which makes "earlier document" a stable way to break
ties. Building keeps about 100 bytes of memory a document, to find repeats. Documents are added at the end of each file
without building it again.

A store folder: texts.bin (UTF-8, one after another), offsets.bin int64[rows + 1] into it, ids.bin and id_offsets.bin
likewise, sources.bin uint32[rows] (the names are in the manifest), words.bin int32[rows] (split at white space),
digests.bin (16 bytes a row, of its terms: what tells repeats), and manifest.json.
"""

import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retrieval import folders
from retrieval.analyze import ANALYZERS
from tasks import files
from tasks.errors import InputError

KIND, VERSION = "corpus store", 2
TEXT_COLUMNS = ("text", "content", "contents", "body", "passage", "paragraph", "document", "abstract")
ID_COLUMNS = ("id", "_id", "doc_id", "docid", "document_id")
SOURCE_COLUMNS = ("source",)
Progress = Callable[[int, int | None, str], None]  # (done, total or None where it is not known, what)


@dataclass(frozen=True)
class Document:
    id: str
    text: str
    source: str = ""


class Corpus:
    """A store opened: `corpus[row]` is a Document, `len(corpus)` their number.

    `letters` uint8[bytes] and `offsets` int64[rows + 1] are the mapped text; `words` int32[rows]; `source_names`.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.manifest = folders.load(self.folder, KIND, VERSION)
        if self.manifest is None:
            raise InputError(f"{folder} is not a corpus store: it has no {folders.MANIFEST}")
        self.letters, self._ids = self._map("texts", np.uint8), self._map("ids", np.uint8)
        self.offsets, self._id_offsets = self._map("offsets", np.int64), self._map("id_offsets", np.int64)
        self.sources, self.words = self._map("sources", np.uint32), self._map("words", np.int32)
        self.source_names: list[str] = list(self.manifest["by_source"])

    def _map(self, name: str, kind: type) -> np.ndarray:
        """As far as the manifest goes: documents that are being added are not there yet."""
        size = self.manifest["files"][f"{name}.bin"] // np.dtype(kind).itemsize
        return np.memmap(self.folder / f"{name}.bin", kind, "r", shape=size)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Document:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a corpus of {len(self)} documents")
        id = self._ids[self._id_offsets[row] : self._id_offsets[row + 1]].tobytes().decode()
        return Document(id, self.encoded(row).decode(), self.source_names[self.sources[row]])

    def __iter__(self) -> Iterator[Document]:
        return (self[row] for row in range(len(self)))

    def encoded(self, row: int) -> bytes:
        """One text as UTF-8."""
        return self.letters[self.offsets[row] : self.offsets[row + 1]].tobytes()

    def texts(self, rows: Iterable[int]) -> list[str]:
        return [self.encoded(row).decode() for row in rows]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all documents in their order: id, source and text."""
        return self.manifest["sha256"]

    @property
    def statistics(self) -> dict:
        """documents, words, bytes; by_source: {name: the same}; dropped: {blank, duplicates}."""
        return {name: self.manifest[name] for name in ("documents", "words", "bytes", "by_source", "dropped")}

    @property
    def parts(self) -> list[int]:
        """Where parts end that stay as they are when documents are added: an index is cut there, and only grows.

        A part that is no larger than what is added is joined with it, so that n additions make about log n parts.
        """
        return self.manifest["parts"]

    @property
    def earlier(self) -> list[str]:
        """The fingerprints that the store had before documents were added, the first one first."""
        return self.manifest["earlier"]


def build_corpus(
    documents: Iterable[Document], folder: Path, inputs: Iterable[str] = (), progress: Progress | None = None
) -> Corpus:
    """Writes a store; a complete one at `folder` is opened as it is. `inputs` names where the documents came from.

    Blank texts (without a letter or digit) and exact duplicates (the same lower-cased terms in the same order, the
    first stays) are dropped and counted. Raises InputError where an id repeats or no document is left.
    """
    folders.ensure(Path(folder), KIND, VERSION, lambda place: _write(documents, place, list(inputs), progress, None))
    return Corpus(folder)


def add_documents(
    documents: Iterable[Document], folder: Path, inputs: Iterable[str] = (), progress: Progress | None = None
) -> Corpus:
    """Adds to the store at `folder`, which is then what one built of all documents in this order would be.

    It stays as it was until all are added, also after a kill. Raises InputError as `build_corpus` does; documents that
    are there already are dropped and counted.
    """
    folder = Path(folder)
    folders.extend(folder, KIND, VERSION, lambda: _write(documents, folder, list(inputs), progress, Corpus(folder)))
    return Corpus(folder)


def open_corpus(spec: str, cache: Path, progress: Progress | None = None) -> Corpus:
    """The corpus that `spec` names: a store, or a file, folder, glob or fsspec address of documents.

    The latter are made into a store under `cache` once; changed files (by size, time or etag) make another one. Columns
    are guessed: the text from TEXT_COLUMNS or as the only column, the id (else file:line), the source (else the file's
    name without endings). Raises InputError for what cannot be read, naming file and line.
    """
    if is_store(spec):
        return Corpus(Path(spec).expanduser())
    paths = files.expand(spec)
    key = folders.key(files=[file_state(path) for path in paths], version=VERSION)
    corpus = build_corpus(read_documents(paths), Path(cache) / "corpora" / key, paths, progress)
    if corpus.manifest["inputs"] != paths:
        raise InputError(
            f"{corpus.folder} holds more than {spec}; give it as corpus=, or delete it and it is made again"
        )
    return corpus


def is_store(spec: str) -> bool:
    return "://" not in spec and folders.holds(Path(spec).expanduser(), KIND)


def read_documents(paths: list[str], some: slice = slice(None)) -> Iterator[Document]:
    """Documents of files (or of some of them), in the order of paths and lines. A missing text (null) is blank."""
    shared = os.path.commonpath([path.rpartition("/")[0] for path in paths]) if len(paths) > 1 else ""
    for path in paths[some]:
        name = path.removeprefix(shared).lstrip("/") if len(paths) > 1 else path.rpartition("/")[2]
        stem = path.rpartition("/")[2].split(".")[0]
        text_column = None
        for number, record in files.read_records(path):
            if text_column is None:
                names = {column.strip().lower(): column for column in record}
                id_column, source_column = _first(names, ID_COLUMNS), _first(names, SOURCE_COLUMNS)
                text_column = _first(names, TEXT_COLUMNS) or (next(iter(record)) if len(record) == 1 else None)
                if text_column is None:
                    raise InputError(f"{path}: no text column among {', '.join(record)}; call the text's column 'text'")
            text = "" if text_column in record and record[text_column] is None else record.get(text_column)
            if not isinstance(text, str):
                raise InputError(f"{path}, line {number}: no text in column {text_column!r}; give each record one")
            id, source = record.get(id_column), record.get(source_column)
            id = f"{name}:{number}" if id in (None, "") else str(id)
            yield Document(id, text, stem if source is None else str(source))


def _first(names: dict[str, str], wanted: tuple[str, ...]) -> str | None:
    return next((names[name] for name in wanted if name in names), None)


def file_state(path: str) -> str:
    """The full path and what changes when the file does: size and time, or whatever a remote system tells (etag)."""
    if "://" not in path:
        state = os.stat(os.path.expanduser(path))
        return f"{os.path.abspath(path)} {state.st_size} {state.st_mtime_ns}"
    from fsspec.core import url_to_fs

    system, inner = url_to_fs(path)
    return f"{path} {system.info(inner)}"


def _write(
    documents: Iterable[Document], folder: Path, inputs: list[str], progress: Progress | None, old: Corpus | None
) -> dict:
    """Appends to the files of `old`, or makes them; returns the manifest's entries."""
    rows, text_end, id_end, dropped = 0, 0, 0, {"blank": 0, "duplicates": 0}
    by_source: dict[str, dict] = {}
    seen_texts: set[bytes] = set()
    content, id_hashes = hashlib.sha256(), array("Q")
    if old:
        rows, text_end, id_end = len(old), len(old.letters), len(old._ids)
        by_source = {name: dict(counts) for name, counts in old.manifest["by_source"].items()}
        dropped, inputs = dict(old.manifest["dropped"]), [*old.manifest["inputs"], *inputs]
        digests = (old.folder / "digests.bin").read_bytes()[: 16 * rows]
        seen_texts = {digests[i : i + 16] for i in range(0, len(digests), 16)}
        for document in old:
            id = document.id.encode()
            content.update(_hashed(id, document.source.encode(), document.text.encode()))
            id_hashes.append(int.from_bytes(_digest(id, 8)))
    codes = {source: code for code, source in enumerate(by_source)}
    offsets, id_offsets = (array("q", [] if old else [0]) for _ in range(2))
    words, sources, new_digests = array("i"), array("I"), array("B")
    with (folder / "texts.bin").open("ab") as texts_file, (folder / "ids.bin").open("ab") as ids_file:
        for document in documents:
            terms = terms_of(document.text)
            if not terms:
                dropped["blank"] += 1
                continue
            id = document.id.encode()
            digest = digest_of(terms)
            if digest in seen_texts:
                dropped["duplicates"] += 1
                continue
            seen_texts.add(digest)
            new_digests.frombytes(digest)
            text, source = document.text.encode(), document.source
            content.update(_hashed(id, source.encode(), text))
            texts_file.write(text)
            ids_file.write(id)
            text_end, id_end = text_end + len(text), id_end + len(id)
            offsets.append(text_end)
            id_offsets.append(id_end)
            id_hashes.append(int.from_bytes(_digest(id, 8)))
            words.append(len(document.text.split()))
            sources.append(codes.setdefault(source, len(codes)))
            counts = by_source.setdefault(source, {"documents": 0, "words": 0, "bytes": 0})
            counts["documents"] += 1
            counts["words"] += words[-1]
            counts["bytes"] += len(text)
            if progress and len(words) % 5_000 == 0:
                progress(len(words), None, "reading the corpus")
    rows += len(words)
    if not rows:
        raise InputError(f"no document with text in {', '.join(inputs[:3]) or 'the corpus'}; check the text column")
    arrays = {
        "offsets": offsets, "id_offsets": id_offsets, "words": words, "sources": sources, "digests": new_digests
    }  # fmt: skip
    for name, values in arrays.items():
        with (folder / f"{name}.bin").open("ab") as file:
            values.tofile(file)
    _refuse_repeated_ids(folder, np.asarray(id_hashes), inputs)
    parts = list(old.parts) if old else []
    while parts and parts[-1] - (parts[-2] if len(parts) > 1 else 0) <= len(words):
        parts.pop()
    earlier = [*old.earlier, old.fingerprint] if old else []
    totals = {name: sum(counts[name] for counts in by_source.values()) for name in ("documents", "words", "bytes")}
    return totals | {
        "by_source": by_source, "dropped": dropped, "sha256": content.hexdigest(), "inputs": inputs,
        "parts": sorted({*parts, rows}), "earlier": earlier,
    }  # fmt: skip


def _hashed(id: bytes, source: bytes, text: bytes) -> bytes:
    return b"%d %d %d " % (len(id), len(source), len(text)) + id + source + text


_TERM_BYTES = bytes(ord(chr(b).lower()) if b < 0x80 and chr(b).isalnum() else 0x20 for b in range(256))


def terms_of(text: str) -> list[bytes]:
    """Terms of the analyzer `words`, as bytes; for ASCII by a table, three times as fast."""
    if text.isascii():
        return text.encode().translate(_TERM_BYTES).split()
    return [term.encode() for term in ANALYZERS["words"].terms(text)]


def digest_of(terms: list[bytes]) -> bytes:
    """What two texts have in common that are the same but for case, white space and marks."""
    return _digest(b" ".join(terms), 16)


def _digest(content: bytes, size: int) -> bytes:
    return hashlib.blake2b(content, digest_size=size).digest()


def _refuse_repeated_ids(folder: Path, hashes: np.ndarray, inputs: list[str]) -> None:
    """All at the end and by 64-bit hashes, which takes 8 bytes a document where a dict of strings takes 150."""
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    if not len(same):
        return
    ids, offsets = np.fromfile(folder / "ids.bin", np.uint8), np.fromfile(folder / "id_offsets.bin", np.int64)
    for place in same:
        first, second = (int(row) for row in order[place : place + 2])
        id, other = (ids[offsets[row] : offsets[row + 1]].tobytes() for row in (first, second))
        if id == other:
            raise InputError(
                f"the id {id.decode()!r} repeats in {', '.join(inputs[-3:]) or 'the corpus'}: rows {first} and "
                f"{second} (from 0, blank and repeated texts left out) have it; give each document its own, or none"
            )
