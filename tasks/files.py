"""Files of records, wherever they lie: JSON lines, JSON, CSV, TSV, parquet and plain text, also compressed.

Everything is read as a stream, so that memory does not grow with a corpus (a `.json` array and a compressed parquet
file are the exceptions). Nothing is guessed and nothing is skipped: bytes that are not UTF-8, a broken line or a
truncated archive end the reading with an error that names the place, since a silently shorter file is worse.
"""

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob, has_magic
from pathlib import Path
from typing import BinaryIO

from tasks.errors import InputError

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
COMPRESSIONS = (".gz", ".zst")
NOT_RECORDS = {"card.json", "manifest.json"}  # they describe the files beside them
CHUNK_BYTES = 1 << 20


def expand(spec: str) -> list[str]:
    """The files that `spec` names: one file, all in a folder and its sub-folders, or those a glob matches; sorted.

    `spec` is a local path or an fsspec address (`s3://...`, `https://...`). In folders and globs, files with other
    endings, hidden ones, `card.json` and `manifest.json` are left out. Raises InputError where nothing is left.
    """
    is_file, candidates = _expand_url(spec) if _is_url(spec) else _expand_local(spec)
    if is_file:
        ending(spec)
        return [spec]
    found = sorted(path for path in candidates if _holds_records(path))
    if not found:
        known = ", ".join(FORMATS)
        raise InputError(f"{spec}: no file here ends in {known} (or these with .gz, .zst)")
    return found


def read_records(path: str) -> Iterator[tuple[int, dict]]:
    """Yields (number, record) of one file: numbers are 1-based lines, or rows for `.parquet` and `.json` arrays.

    A record of CSV or TSV starts at its number and has strings only; the first line names the columns (TSV knows no
    quoting, as most published ones). `.txt` gives {"text": ...} for each paragraph, blank lines between them.
    Raises InputError, naming file and line, for what is missing, empty, broken or not UTF-8.
    """
    reader = _READERS[ending(path)]
    number = 0
    with _named_errors(path), _open(path) as stream:
        for number, record in reader(path, stream):
            yield number, record
    if number == 0:
        raise InputError(f"{path}: the file is empty (no records)")


def exists(path: str) -> bool:
    with _named_errors(path):
        if not _is_url(path):
            return Path(path).expanduser().exists()
        system, inner = _filesystem(path)
        return system.exists(inner)


def read_object(path: str) -> dict:
    """The one JSON object that a file such as `card.json` holds. Raises InputError if it is missing or broken."""
    with _named_errors(path), _open(path) as stream:
        text = "".join(line for _, line in _lines(path, stream))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    return _checked(path, "the whole file", value, _has_surrogate(text))


def sha256(path: str) -> str:
    """Hex digest of the file's bytes as stored (compressed ones are not unpacked)."""
    digest = hashlib.sha256()
    with _named_errors(path), _open_raw(path) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def ending(path: str) -> str:
    """The format of a file by its name, one of FORMATS, compression aside. Raises InputError if it is unknown."""
    suffix = Path(_plain_name(path)).suffix
    if suffix not in FORMATS:
        raise InputError(f"{path}: unknown kind of file; known endings are {', '.join(FORMATS)}, each also .gz or .zst")
    return suffix


def _plain_name(path: str) -> str:
    """File name in lower case, without the compression's ending (and without a web address's query)."""
    if path.startswith(("http://", "https://")):
        path = path.split("?")[0]
    name = path.rsplit("/", 1)[-1].lower()
    return name.removesuffix(".gz").removesuffix(".zst")


def _holds_records(path: str) -> bool:
    name = _plain_name(path)
    return Path(name).suffix in FORMATS and name not in NOT_RECORDS and not name.startswith(".")


# Where files lie


def _is_url(path: str) -> bool:
    return "://" in path


def _expand_local(spec: str) -> tuple[bool, list[str]]:
    path = Path(spec).expanduser()
    if path.is_dir():
        return False, [str(p) for p in path.rglob("*") if p.is_file()]
    if path.exists():
        return True, []
    if has_magic(spec):
        return False, [p for p in glob(str(path), recursive=True) if Path(p).is_file()]
    raise InputError(f"{spec}: no such file or folder")


def _expand_url(spec: str) -> tuple[bool, list[str]]:
    with _named_errors(spec):
        system, path = _filesystem(spec)
        if system.isdir(path) and not system.isfile(path):
            return False, [system.unstrip_protocol(p) for p in system.find(path)]
        if system.exists(path):
            return True, []
        if has_magic(path):
            return False, [system.unstrip_protocol(p) for p in system.glob(path)]
    raise InputError(f"{spec}: no such file or folder")


def _filesystem(url: str):
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except ImportError as error:  # fsspec says which package the address needs
        raise InputError(f"{url}: {error}") from error


def _open_raw(path: str) -> BinaryIO:
    if not _is_url(path):
        return Path(path).expanduser().open("rb")
    system, inner = _filesystem(path)
    return system.open(inner, "rb")


@contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked. The stream has `peek`, and iterates over lines."""
    suffix = Path(path.split("?")[0] if path.startswith("http") else path).suffix.lower()
    with _open_raw(path) as raw:
        if suffix == ".gz":
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield io.BufferedReader(unpacked, CHUNK_BYTES)
        elif suffix == ".zst":
            yield io.BufferedReader(_Zstandard(raw), CHUNK_BYTES)
        elif isinstance(raw, io.BufferedReader):
            yield raw
        else:
            yield io.BufferedReader(raw, CHUNK_BYTES)


class _Zstandard(io.RawIOBase):
    """Unpacks zstd frames; unlike zstandard's own stream_reader, raises EOFError where the last one is cut short."""

    def __init__(self, raw: BinaryIO):
        import zstandard

        self._raw, self._decompressor, self._error = raw, zstandard.ZstdDecompressor(), zstandard.ZstdError
        self._frame, self._packed, self._unpacked = None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._unpacked:
            self._packed = self._packed or self._raw.read(CHUNK_BYTES // 8)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the last frame is incomplete")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._unpacked = memoryview(self._frame.decompress(self._packed))
            except self._error as error:
                raise OSError(f"not a sound zstd file: {error}") from error
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._unpacked))
        buffer[:size], self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return size


@contextmanager
def _named_errors(path: str) -> Iterator[None]:
    """Turns what goes wrong below into one InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except EOFError as error:
        raise InputError(f"{path}: the compressed file is truncated; fetch or pack it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: not a sound gzip file ({error}); fetch or pack it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:
        if not _is_url(path):
            raise  # a defect of ours; but remote file systems raise errors of their own kinds
        raise InputError(f"{path}: cannot be read ({error})") from error


# Formats: reader(path, stream) -> (number, record) pairs


def _lines(path: str, stream: BinaryIO) -> Iterator[tuple[int, str]]:
    """(1-based number, text with its line end) of each line; a byte order mark at the start is dropped."""
    offset = 0
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}, line {number}: byte 0x{line[error.start]:02x} at offset {offset + error.start} of the text "
                f"({error.start} of the line) is not UTF-8; save the file as UTF-8"
            ) from error
        offset += len(line)
        yield number, text.removeprefix("\ufeff") if number == 1 else text


def _read_jsonl(path: str, stream: BinaryIO) -> Iterator[tuple[int, dict]]:
    for number, line in _lines(path, stream):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON: {error}") from error
        yield number, _checked(path, f"line {number}", record, _has_surrogate(line))


def _read_json(path: str, stream: BinaryIO) -> Iterator[tuple[int, dict]]:
    """An array of objects; many files of JSON lines bear this ending too, and are read as such."""
    if not stream.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _read_jsonl(path, stream)
        return
    text = "".join(line for _, line in _lines(path, stream))
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    has_surrogate = _has_surrogate(text)
    for number, record in enumerate(records, 1):
        yield number, _checked(path, f"entry {number}", record, has_surrogate)


def _has_surrogate(text: str) -> bool:
    return "\\u" in text and re.search(r"\\u[dD][89a-fA-F]", text) is not None


def _checked(path: str, place: str, record, has_surrogate: bool) -> dict:
    if not isinstance(record, dict):
        raise InputError(f'{path}, {place}: an object such as {{"text": ...}} is wanted, not {str(record)[:40]!r}')
    if has_surrogate:  # half of an escaped pair could not be written as UTF-8 later
        try:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"{path}, {place}: half of a \\ud... surrogate pair is no character") from error
    return record


def _read_csv(path: str, stream: BinaryIO, **dialect) -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long article
    rows = csv.reader((line for _, line in _lines(path, stream)), strict=True, **dialect)
    columns, start = None, 1
    while True:
        start = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise InputError(f"{path}, line {start}: broken {ending(path)[1:].upper()} record: {error}") from error
        if row is None:
            return
        if not row:
            continue  # a blank line
        if columns is None:
            columns = [column.strip() for column in row]
            if twice := {column for column in columns if columns.count(column) > 1}:
                raise InputError(f"{path}, line {start}: the column {min(twice)!r} stands there twice; rename one")
        elif len(row) != len(columns):
            raise InputError(f"{path}, line {start}: {len(row)} fields, but the first line names {len(columns)}")
        else:
            yield start, dict(zip(columns, row, strict=True))


def _read_tsv(path: str, stream: BinaryIO) -> Iterator[tuple[int, dict]]:
    return _read_csv(path, stream, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_parquet(path: str, stream: BinaryIO) -> Iterator[tuple[int, dict]]:
    import pyarrow
    from pyarrow import parquet

    if not stream.peek(1):
        return
    packed = path.lower().endswith(COMPRESSIONS)  # parquet is read from its end, so an unpacked copy is needed
    try:
        number = 0
        for batch in parquet.ParquetFile(io.BytesIO(stream.read()) if packed else stream).iter_batches(1024):
            for record in batch.to_pylist():
                number += 1
                yield number, record
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a sound parquet file ({error})") from error


def _read_txt(path: str, stream: BinaryIO) -> Iterator[tuple[int, dict]]:
    start, paragraph = 0, []
    for number, line in _lines(path, stream):
        if line.isspace():
            if paragraph:
                yield start, {"text": "\n".join(paragraph)}
            paragraph = []
        else:
            start = start if paragraph else number
            paragraph.append(line.rstrip())
    if paragraph:
        yield start, {"text": "\n".join(paragraph)}


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
