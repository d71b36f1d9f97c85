import gzip
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from slow_bm25 import as_pairs, slow_search
from test_engines import DOCUMENT, ENGLISH, QUERY, WORDS, store, texts_of

from retrieval.engines import ENGINES, scan
from retrieval.engines.scan import Stream
from retrieval.scoring import SCORINGS
from tasks.errors import InputError


def open_scan(corpus, folder, threads=1, scoring="lucene", analyzer=ENGLISH):
    return ENGINES["scan"](corpus, analyzer, scoring, 1.2, 0.75, folder, threads)


@settings(max_examples=30, deadline=None)
@given(st.lists(DOCUMENT, min_size=1, max_size=12), st.lists(QUERY, max_size=4), st.data())
def test_equals_the_slow_twin_on_adversarial_corpora(texts, queries, data):
    scoring = data.draw(st.sampled_from(sorted(set(SCORINGS) - {"okapi"})))
    k = data.draw(st.integers(1, 14))
    with TemporaryDirectory() as folder:
        corpus = store(texts, Path(folder) / "store")
        found = open_scan(corpus, Path(folder), 2, scoring).search(queries, k)
        assert as_pairs(found) == slow_search(texts_of(corpus), ENGLISH, scoring, 1.2, 0.75, queries, k)


@pytest.mark.parametrize("threads", [1, 3])
def test_equals_bm25_to_the_bit_also_in_several_batches_and_chunks(threads, real_text, tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "CHUNK_DOCUMENTS", 50)
    monkeypatch.setattr(scan, "QUERIES_A_BATCH", 30)
    corpus = store(real_text, tmp_path / "store")
    queries = [ENGLISH.terms(text) for text in real_text[::11]]
    ours = ENGINES["bm25"](corpus, ENGLISH, "lucene", 1.2, 0.75, tmp_path, 1).search(queries, 25)
    theirs = open_scan(corpus, tmp_path, threads).search(queries, 25)
    assert np.array_equal(ours.rows, theirs.rows)
    assert np.array_equal(ours.scores, theirs.scores)


def test_streams_files_of_every_kind_and_keeps_repeats(real_text, tmp_path):
    texts = [*real_text[:200], "", real_text[0], *real_text[200:300]]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "files").mkdir()
    with gzip.open(tmp_path / "files" / "a.jsonl.gz", "wt") as file:
        file.writelines(lines[:150])
    (tmp_path / "files" / "b.jsonl.zst").write_bytes(zstandard.compress("".join(lines[150:250]).encode()))
    parquet.write_table(pyarrow.table({"text": texts[250:]}), tmp_path / "files" / "c.parquet")
    queries = [ENGLISH.terms(text) for text in real_text[:300:30]]
    for spec in (str(tmp_path / "files"), f"file://{tmp_path}/files"):
        found = open_scan(Stream(spec), tmp_path / "kept").search(queries, 10)
        assert as_pairs(found) == slow_search(list(filter(None, texts)), ENGLISH, "lucene", 1.2, 0.75, queries, 10)


def test_goes_on_where_it_was_killed(real_text, tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "CHUNK_DOCUMENTS", 20)
    monkeypatch.setattr(scan, "CHUNKS_A_LEG", 2)
    monkeypatch.setattr(scan, "SECONDS_A_SAVE", -1)
    corpus = store(real_text, tmp_path / "store")
    queries = [ENGLISH.terms(text) for text in real_text[::40]]
    expected = open_scan(corpus, tmp_path / "other").search(queries, 15)
    seen = []

    def stop(done, total, what):
        seen.append((what, done))
        if (what, done) == ("scanning", 240) and len(seen) < 1000:
            raise KeyboardInterrupt

    arguments = (corpus, ENGLISH, "lucene", 1.2, 0.75, tmp_path / "kept", 2)
    with pytest.raises(KeyboardInterrupt):
        ENGINES["scan"](*arguments, stop).search(queries, 15)
    first_of_second = len(seen)
    seen.extend([("", 0)] * 1000)
    found = ENGINES["scan"](*arguments, stop).search(queries, 15)
    again = [done for what, done in seen[first_of_second:] if what == "scanning"]
    assert again[0] == 240  # what was seen before, 160 documents, is not seen again
    assert np.array_equal(found.rows, expected.rows)
    assert np.array_equal(found.scores, expected.scores)
    assert not list((tmp_path / "kept").glob("*unfinished*"))


def test_statistics_are_counted_once_and_may_be_given(real_text, tmp_path):
    corpus = store(real_text[:100], tmp_path / "store")
    queries = [ENGLISH.terms(real_text[3])]
    what = []
    engine = ENGINES["scan"](corpus, ENGLISH, "lucene", 1.2, 0.75, tmp_path, 1, lambda *step: what.append(step[2]))
    first = engine.search(queries, 5)
    assert {"counting", "scanning"} == set(what)
    what.clear()
    (file,) = tmp_path.glob("*.statistics.json")
    assert np.array_equal(engine.search(queries, 5, statistics=file).scores, first.scores)
    assert set(what) == {"scanning"}
    with pytest.raises(InputError, match="does not say in how many documents 'zebra' stands"):
        engine.search([["zebra"]], 5, statistics=file)
    with pytest.raises(InputError, match="no such file of statistics"):
        engine.search(queries, 5, statistics=tmp_path / "absent.json")
    file.write_text("[1")
    with pytest.raises(InputError, match="is not a file of statistics; delete it"):
        open_scan(corpus, tmp_path).search(queries, 5)


def test_refuses_okapi_and_a_corpus_that_changed(real_text, tmp_path):
    corpus = store(real_text[:50], tmp_path / "store")
    with pytest.raises(InputError, match="cannot do the scoring okapi"):
        open_scan(corpus, tmp_path, scoring="okapi")
    engine = open_scan(corpus, tmp_path, analyzer=WORDS)
    engine.search([["python"]], 3)
    (file,) = tmp_path.glob("*.statistics.json")
    statistics = json.loads(file.read_text())
    file.write_text(json.dumps(statistics | {"documents": 60}))
    with pytest.raises(InputError, match="the corpus has 50 documents, its statistics say 60"):
        open_scan(corpus, tmp_path, analyzer=WORDS).search([["python"]], 3)
