"""Reading files: every format and compression gives the same records; every defect is named with its place."""

import csv
import gzip
import hashlib
import json
import subprocess
import sys

import pytest
import zstandard

from tasks.errors import InputError
from tasks.files import expand, read_object, read_records, sha256

ROWS = [
    {"text": 'plain, with a comma and "quotes"', "label": "a"},
    {"text": "ünïcödé 🙂 и ещё", "label": "b"},
    {"text": "third  one", "label": "a"},
]


def as_bytes(ending: str, rows=ROWS) -> bytes:
    """The rows as one file, written by libraries that are not the reader's."""
    if ending == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if ending == ".json":
        return json.dumps(rows, indent=1, ensure_ascii=False).encode()
    if ending == ".tsv":
        return ("text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in rows)).encode()
    if ending == ".csv":
        import pandas

        return pandas.DataFrame(rows).to_csv(index=False).encode()
    import pyarrow as pa
    from pyarrow import parquet

    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_format_and_compression_gives_the_same_records(tmp_path, ending, packing):
    path = tmp_path / f"data{ending}{packing}"
    path.write_bytes(PACK[packing](as_bytes(ending)))
    assert [record for _, record in read_records(str(path))] == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.zst", "a.csv.gz", "a.parquet"])
def test_an_fsspec_address_reads_as_a_local_file(name):
    import fsspec

    memory = fsspec.filesystem("memory")
    ending, _, packing = name[1:].partition(".g") if ".gz" in name else name[1:].partition(".z")
    content = PACK[{"": "", "z": ".gz", "st": ".zst"}[packing]](as_bytes(ending))
    folder = f"/test_files_{name.replace('.', '_')}"
    memory.pipe(f"{folder}/deep/{name}", content)
    memory.pipe(f"{folder}/card.json", b"{}")
    (found,) = expand(f"memory://{folder}")
    assert found == f"memory://{folder}/deep/{name}"
    assert expand(f"memory://{folder}/deep/a*") == [found] == expand(found)
    assert [record for _, record in read_records(found)] == ROWS
    assert sha256(found) == hashlib.sha256(content).hexdigest()
    with pytest.raises(InputError, match="no such file"):
        expand(f"memory://{folder}/absent.jsonl")


def test_zstandard_frames_follow_each_other_and_gzip_members_too(tmp_path):
    for packing in (".gz", ".zst"):
        path = tmp_path / f"data.jsonl{packing}"
        path.write_bytes(b"".join(PACK[packing](as_bytes(".jsonl", [row] * 5000)) for row in ROWS))
        records = [record for _, record in read_records(str(path))]
        assert records == [row for row in ROWS for _ in range(5000)]


def test_numbers_are_the_lines_where_records_begin(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n\n  \n{"text": "b"}\r\n')
    assert list(read_records(str(path))) == [(1, {"text": "a"}), (4, {"text": "b"})]
    path = tmp_path / "data.csv"
    path.write_text('text,label\n"two\nlines",x\n\nlast,y\n')
    assert list(read_records(str(path))) == [
        (2, {"text": "two\nlines", "label": "x"}),
        (5, {"text": "last", "label": "y"}),
    ]
    path = tmp_path / "book.txt"
    path.write_text("\nOne line\nand two.\n\n \n\nThen one.")
    assert list(read_records(str(path))) == [(2, {"text": "One line\nand two."}), (7, {"text": "Then one."})]


def test_csv_takes_a_byte_order_mark_and_huge_fields(tmp_path):
    path, huge = tmp_path / "data.csv", "word " * 60_000
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        csv.writer(stream).writerows([["text", "label"], [huge, "x"]])
    assert list(read_records(str(path))) == [(2, {"text": huge, "label": "x"})]


def test_json_lines_under_the_name_json(tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes(as_bytes(".jsonl"))
    assert [record for _, record in read_records(str(path))] == ROWS


def test_expand_sorts_and_leaves_out_what_holds_no_records(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in [
        "b.jsonl",
        "a.TXT",
        "deep/c.csv.gz",
        "card.json",
        "manifest.json",
        ".hidden.jsonl",
        "README.md",
        "x.gz",
    ]:
        (tmp_path / name).write_text("x")
    assert expand(str(tmp_path)) == [str(tmp_path / name) for name in ["a.TXT", "b.jsonl", "deep/c.csv.gz"]]
    assert expand(f"{tmp_path}/*") == [str(tmp_path / name) for name in ["a.TXT", "b.jsonl"]]
    assert expand(f"{tmp_path}/b.jsonl") == [f"{tmp_path}/b.jsonl"]


@pytest.mark.parametrize(
    "spec", ["absent.jsonl", "absent", "absent*.jsonl", "README.md", "folder", "no-such-protocol://x"]
)
def test_expand_names_what_is_not_there(tmp_path, spec):
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "folder").mkdir()
    spec = spec if "://" in spec else f"{tmp_path}/{spec}"
    with pytest.raises(InputError) as caught:
        expand(spec)
    assert str(caught.value).startswith(spec)


BROKEN = {
    "empty": ("data.jsonl", b"", r"empty"),
    "empty csv": ("data.csv", b"", r"empty"),
    "csv header only": ("data.csv", b"text,label\n", r"empty"),
    "empty parquet": ("data.parquet", b"", r"empty"),
    "blank txt": ("data.txt", b"\n \n", r"empty"),
    "empty gzip": ("data.jsonl.gz", gzip.compress(b""), r"empty"),
    "broken line": ("data.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"line 2: not JSON: Expecting ',' delimiter"),
    "not an object": ("data.jsonl", b'{"text": "a"}\n["b"]\n', r"line 2: .*object"),
    "entry not an object": ("data.json", b'[{"text": "a"}, 3]', r"entry 2: .*object"),
    "broken array": ("data.json", b'[{"text": "a"},', r"not JSON"),
    "nested too deep": ("data.jsonl", b"[" * 200_000, r"line 1: not JSON"),
    "half a surrogate": ("data.jsonl", b'{"text": "\\ud83d\\ude42"}\n{"text": "x\\ud83d"}\n', r"line 2: half"),
    "undecodable": ("data.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"line 2: byte 0xe9 at offset 24 .*\(10 of"),
    "undecodable txt": ("data.txt", b"fine\n\xff", r"line 2: byte 0xff at offset 5 "),
    "undecodable csv.gz": ("d.csv.gz", gzip.compress(b"text,label\nab\xff,x\n"), r"line 2: byte 0xff at offset 13 "),
    "short row": ("data.csv", b"text,label\na,x\nb\n", r"line 3: 1 fields, but the first line names 2"),
    "long row": ("data.tsv", b"text\tlabel\na\tb\tc\n", r"line 2: 3 fields, but the first line names 2"),
    "open quote": ("data.csv", b'text,label\na,x\n"b,x\nc,y\n', r"line 3: broken CSV record: unexpected end"),
    "column twice": ("data.csv", b"text,text\na,b\n", r"column 'text' stands there twice"),
    "truncated gzip": ("data.jsonl.gz", gzip.compress(as_bytes(".jsonl"))[:-9], r"truncated"),
    "no gzip": ("data.jsonl.gz", b"plain text", r"not a sound gzip file"),
    "corrupt gzip": ("d.jsonl.gz", gzip.compress(b'{"text": "a"}\n')[:-8] + bytes(8), r"not a sound gzip file"),
    "truncated zstd": ("data.jsonl.zst", PACK[".zst"](as_bytes(".jsonl"))[:-4], r"truncated"),
    "no zstd": ("data.jsonl.zst", b"plain text", r"not a sound zstd file"),
    "no parquet": ("data.parquet", b"plain text, surely", r"not a sound parquet file"),
    "truncated parquet": ("data.parquet", as_bytes(".parquet")[:-30], r"not a sound parquet file"),
    "unknown ending": ("data.xlsx", b"x", r"unknown kind of file; known endings are .jsonl"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_with_its_place(tmp_path, case):
    name, content, message = BROKEN[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        list(read_records(str(path)))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_a_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent\.csv: no such file"):
        list(read_records(str(tmp_path / "absent.csv")))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match=r"folder\.csv: cannot be read \(Is a directory\)"):
        list(read_records(str(tmp_path / "folder.csv")))
    with pytest.raises(InputError, match="no such file"):
        sha256(str(tmp_path / "absent.csv"))


def test_the_consumers_own_errors_pass_through(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(as_bytes(".jsonl"))
    with pytest.raises(EOFError, match="mine"):
        _raise_within(read_records(str(path)))


def _raise_within(records):
    for _ in records:
        raise EOFError("mine")


def test_read_object(tmp_path):
    path = tmp_path / "card.json"
    path.write_text('{\n "name": "x"\n}')
    assert read_object(str(path)) == {"name": "x"}
    path.write_text('{"name": ')
    with pytest.raises(InputError, match=r"card\.json: not JSON"):
        read_object(str(path))
    path.write_text("[]")
    with pytest.raises(InputError, match="object"):
        read_object(str(path))


def test_importing_is_light():
    code = "import sys, tasks.files; print(sorted({'pyarrow', 'zstandard', 'fsspec', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
