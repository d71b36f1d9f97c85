import csv
import gzip
import json
import os

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from retrieval import folders
from retrieval.corpus import Corpus, Document, add_documents, build_corpus, open_corpus
from tasks.errors import InputError


def documents(corpus: Corpus) -> list[tuple[str, str, str]]:
    return [(document.id, document.text, document.source) for document in corpus]


def write_lines(path, *records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_store_gives_back_what_went_in(real_text, tmp_path):
    given = [Document(f"d{i}", f"{text} \u4e2d\U0001f600 {i}", f"s{i % 3}") for i, text in enumerate(real_text)]
    corpus = build_corpus(iter(given), tmp_path / "store")
    assert len(corpus) == len(given)
    assert list(corpus) == given
    assert corpus[17] == given[17]
    assert corpus.texts([5, 3, 5]) == [given[5].text, given[3].text, given[5].text]
    assert corpus.words.tolist() == [len(document.text.split()) for document in given]
    statistics = corpus.statistics
    assert statistics["documents"] == len(given)
    assert statistics["words"] == corpus.words.sum()
    assert statistics["bytes"] == sum(len(document.text.encode()) for document in given)
    assert list(statistics["by_source"]) == ["s0", "s1", "s2"]
    assert statistics["by_source"]["s1"]["documents"] == len(given[1::3])
    assert statistics["by_source"]["s1"]["words"] == corpus.words[1::3].sum()
    for row in (-1, len(given)):
        with pytest.raises(IndexError):
            corpus[row]


def test_blank_and_repeated_texts_are_dropped_and_counted(tmp_path):
    texts = ["The cat.", "", " \n", "?! --", "the CAT", "the cat sat", "Café", "café!", "cafe"]
    corpus = build_corpus((Document(str(i), text) for i, text in enumerate(texts)), tmp_path / "store")
    assert [document.id for document in corpus] == ["0", "5", "6", "8"]
    assert corpus.statistics["dropped"] == {"blank": 3, "duplicates": 2}


def test_repeated_id_is_an_error_naming_it_and_its_rows(tmp_path):
    given = [Document("a", "one"), Document("b", ""), Document("b", "two"), Document("c", "x"), Document("b", "four")]
    with pytest.raises(InputError, match=r"the id 'b' repeats in some\.csv: rows 1 and 3"):
        build_corpus(given, tmp_path / "store", ["some.csv"])
    assert not list(tmp_path.iterdir())


def test_fingerprint_is_of_the_documents(tmp_path):
    def fingerprint(name: str, *given: Document) -> str:
        return build_corpus(given, tmp_path / name).fingerprint

    a, b = Document("1", "one", "s"), Document("2", "two", "s")
    assert fingerprint("x", a, b) == fingerprint("y", a, b)
    others = [(b, a), (a,), (a, Document("3", "two", "s")), (a, Document("2", "two", "t")), (Document("1", "onet"), b)]
    assert len({fingerprint(f"z{i}", *other) for i, other in enumerate([(a, b), *others])}) == 6


def test_every_kind_of_file(tmp_path):
    folder = tmp_path / "files"
    (folder / "deep").mkdir(parents=True)
    with gzip.open(folder / "a.jsonl.gz", "wt") as file:
        file.write('{"_id": 7, "Text": "alpha", "source": "given"}\n{"_id": null, "Text": "aleph"}\n{"Text": null}\n')
    with (folder / "b.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["content", "year"], ["beta, or two\nlines", "1990"]])
    parquet.write_table(pyarrow.table({"doc_id": ["p"], "contents": ["gamma"]}), folder / "c.parquet")
    (folder / "deep" / "d.txt").write_text("delta one\nline\n\n\nepsilon\n")
    write_lines(folder / "e.jsonl", {"anything": "zeta"})
    (folder / "manifest.json").write_text("{}")
    corpus = open_corpus(str(folder), tmp_path / "cache")
    assert documents(corpus) == [
        ("7", "alpha", "given"),
        ("a.jsonl.gz:2", "aleph", "a"),
        ("b.csv:2", "beta, or two\nlines", "b"),
        ("p", "gamma", "c"),
        ("deep/d.txt:1", "delta one\nline", "d"),
        ("deep/d.txt:5", "epsilon", "d"),
        ("e.jsonl:1", "zeta", "e"),
    ]
    assert corpus.statistics["dropped"] == {"blank": 1, "duplicates": 0}
    assert len(corpus.manifest["inputs"]) == 5
    assert documents(open_corpus(str(folder / "b.csv"), tmp_path / "cache"))[0][0] == "b.csv:2"
    assert len(open_corpus(str(folder / "*.jsonl*"), tmp_path / "cache")) == 3


def test_same_names_in_two_folders_have_two_ids(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(f"text of {name}")
    corpus = open_corpus(str(tmp_path / "*" / "a.txt"), tmp_path / "cache")
    assert [document.id for document in corpus] == ["x/a.txt:1", "y/a.txt:1"]


def test_fsspec_address(tmp_path):
    import fsspec

    with fsspec.open("memory://corpus-test/a.jsonl", "w") as file:
        file.write('{"text": "alpha"}\n')
    assert documents(open_corpus("memory://corpus-test", tmp_path))[0][1:] == ("alpha", "a")


def test_files_become_a_store_once_and_a_store_is_opened_as_it_is(tiny_corpus, tmp_path):
    seen = []
    corpus = open_corpus(str(tiny_corpus), tmp_path)
    again = open_corpus(str(tiny_corpus), tmp_path, lambda *progress: seen.append(progress))
    assert again.folder == corpus.folder
    assert not seen
    assert len(corpus) + corpus.statistics["dropped"]["duplicates"] == 600
    as_store = open_corpus(str(corpus.folder), tmp_path / "unused")
    assert as_store.fingerprint == corpus.fingerprint
    assert not (tmp_path / "unused").exists()


def test_a_changed_file_makes_another_store(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = open_corpus(str(path), tmp_path / "cache")
    path.write_text("two")  # the same size
    os.utime(path, (1, 1))
    assert [document.text for document in open_corpus(str(path), tmp_path / "cache")] == ["two"]
    assert [document.text for document in first] == ["one"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "a", "body": "x"}\n{"id": "b"}\n', "bad.jsonl, line 2: no text in column 'body'"),
        ('{"text": "x"}\n{"text": 3}\n', "bad.jsonl, line 2: no text in column 'text'"),
        ('{"id": "a", "label": "x"}\n', "bad.jsonl: no text column among id, label"),
        ('{"text": "x"}\n{"text": \n', "bad.jsonl, line 2"),
        ('{"text": " "}\n', "no document with text in .*bad.jsonl"),
        ("", "bad.jsonl: the file is empty"),
    ],
)
def test_bad_files_are_named_and_leave_nothing(content, message, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        open_corpus(str(path), tmp_path / "cache")
    assert not list(tmp_path.glob("cache/corpora/*"))


def test_missing_and_damaged_stores(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        open_corpus(str(tmp_path / "absent"), tmp_path)
    with pytest.raises(InputError, match="is not a corpus store"):
        Corpus(tmp_path)
    store = tmp_path / "store"
    build_corpus([Document("a", "some text")], store)
    (store / "texts.bin").write_bytes(b"some")
    with pytest.raises(InputError, match=r"texts\.bin has 4 bytes instead of 9"):
        open_corpus(str(store), tmp_path)


def test_added_documents_make_the_store_of_all_documents(real_text, tmp_path):
    given = [Document(f"d{i}", f"{text} \u4e2d", f"s{i % 3}") for i, text in enumerate(real_text[:300])]
    given[150:150] = [Document("blank", " "), Document("again", given[3].text.upper()), Document("new", "x", "z")]
    whole = build_corpus(given, tmp_path / "whole")
    store = tmp_path / "store"
    build_corpus(given[:100], store, ["one"])
    for first, last, parts in ((100, 110, 2), (110, 110, 2), (110, 180, 2), (180, 200, 3), (200, len(given), 1)):
        old = Corpus(store)
        corpus = add_documents(given[first:last], store, [f"from {first}"])
        assert documents(old) == documents(whole)[: len(old)]  # who has it open is not disturbed
        assert len(corpus.parts) == parts  # one no larger than what is added is joined with it
        assert corpus.parts[-1] == len(corpus)
    for file in store.glob("*.bin"):
        assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()
    assert documents(corpus) == documents(whole)
    assert corpus.statistics == whole.statistics
    assert corpus.fingerprint == whole.fingerprint
    assert corpus.manifest["inputs"] == ["one", "from 100", "from 110", "from 110", "from 180", "from 200"]


def test_an_addition_that_fails_leaves_the_store_as_it_was(real_text, tmp_path):
    store = tmp_path / "store"
    before = build_corpus([Document(str(i), text) for i, text in enumerate(real_text[:50])], store)

    def killed():
        yield Document("a", "words that are new")
        yield Document("b", "x" * 100_000)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_documents(killed(), store)
    with pytest.raises(InputError, match=r"the id '7' repeats in more\.csv: rows 7 and 51"):
        add_documents([Document("a", "words that are new"), Document("7", "also new")], store, ["more.csv"])
    assert folders.load(store, "corpus store", 2) == before.manifest
    assert all(path.stat().st_size == size for path, size in sizes_of(store, before))
    with pytest.raises(InputError, match="is not a corpus store"):
        add_documents([Document("a", "words")], tmp_path)


def sizes_of(store, corpus: Corpus) -> list:
    return [(store / name, size) for name, size in corpus.manifest["files"].items()]


def test_what_a_killed_addition_left_is_not_there_and_goes(real_text, tmp_path):
    store = tmp_path / "store"
    given = [Document(str(i), text) for i, text in enumerate(real_text[:50])]
    before = build_corpus(given[:40], store)
    for path, _ in sizes_of(store, before):
        with path.open("ab") as file:
            file.write(b"half of some")
    assert documents(Corpus(store)) == documents(before)
    assert Corpus(store).words.tolist() == before.words.tolist()
    corpus = add_documents(given[40:], store)
    assert documents(corpus) == [(str(i), text, "") for i, text in enumerate(real_text[:50])]
    assert all(path.stat().st_size == size for path, size in sizes_of(store, corpus))


def test_files_whose_store_was_added_to_are_not_taken_for_it(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    corpus = open_corpus(str(path), tmp_path / "cache")
    add_documents([Document("b", "two")], corpus.folder, ["b.txt"])
    with pytest.raises(InputError, match=r"holds more than .*a\.txt; give it as corpus="):
        open_corpus(str(path), tmp_path / "cache")
    assert len(open_corpus(str(corpus.folder), tmp_path / "cache")) == 2


def test_memory_does_not_hold_the_text(tmp_path):
    """What stays is about 100 bytes a document, whatever the length of its text."""
    import tracemalloc

    words = np.random.default_rng(0).integers(0, 1 << 30, 1000)
    stream = (Document(str(i), f"{i} " + " ".join(map(str, words)), "s") for i in range(150))
    tracemalloc.start()
    corpus = build_corpus(stream, tmp_path / "store")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert corpus.statistics["bytes"] > 1.2e6
    assert peak < 5e5
