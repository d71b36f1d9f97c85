"""A rival for those who have one: an OpenSearch or Elasticsearch server, over HTTP.

The address is the environment variable TLM_OPENSEARCH (http://localhost:9200). Documents are sent as our terms with
blanks between, and split at blanks there, so that the analyzer is ours; the scoring is the server's, Lucene's, whose
document lengths are rounded to one byte. A query is a disjunction of its distinct terms, weighted by their counts. One
with more terms than the server allows clauses is sent in parts whose scores are added up; it ends when no document that
was not seen can belong to the best, so that it is exact (but for the last digit of a sum, which may decide near-ties).
Every failure is tried again, three times, and then an error: no query ends without its hits.
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np

from retrieval import folders
from retrieval.analyze import Analyzer
from retrieval.corpus import Corpus, Progress
from retrieval.engines import MEMORY, Hits
from tasks.errors import InputError

VERSION = 1
ADDRESS = "http://localhost:9200"
DOCUMENTS_A_REQUEST, QUERIES_A_REQUEST = 1_000, 32
IDS_A_REQUEST = 10_000
MOST_HITS = 10_000  # index.max_result_window, unless it is set
TRIES, SECONDS_BETWEEN, SECONDS_A_REQUEST = 4, 0.5, 120
RETRIED = (429, 500, 502, 503, 504)


def open_engine(
    corpus: Corpus,
    analyzer: Analyzer,
    scoring: str,
    k1: float,
    b: float,
    folder: Path,
    threads: int = 0,
    progress: Progress | None = None,
    memory: int = MEMORY,
) -> "OpenSearch":
    """The server's index of this corpus; documents are sent unless it holds all of them. Keeps nothing in `folder`."""
    if scoring != "lucene":
        raise InputError(f"the engine opensearch does not know the scoring {scoring}; choose lucene")
    client = Client(os.environ.get("TLM_OPENSEARCH", ADDRESS))
    name = "tlm-" + folders.key(corpus=corpus.fingerprint, analyzer=analyzer.hash, k1=k1, b=b, version=VERSION)
    start = time.perf_counter()
    if client.count(name) != len(corpus):
        client.delete(name)
        client.create(name, len(corpus), k1, b)
        for first in range(0, len(corpus), DOCUMENTS_A_REQUEST):
            rows = range(first, min(first + DOCUMENTS_A_REQUEST, len(corpus)))
            client.add(name, [(row, " ".join(analyzer.terms(corpus[row].text))) for row in rows])
            if progress:
                progress(rows.stop, len(corpus), "indexing")
        client.refresh(name)
        if (held := client.count(name)) != len(corpus):
            raise InputError(f"{client.address}: the index {name} holds {held} of {len(corpus)} documents; try again")
    return OpenSearch(client, name, len(corpus), time.perf_counter() - start)


class OpenSearch:
    def __init__(self, client: "Client", name: str, num_documents: int, seconds: float):
        self._client, self._name, self._num_documents, self.seconds = client, name, num_documents, seconds
        self._most_clauses = client.most_clauses()

    def search(self, queries: list[list[str]], k: int) -> Hits:
        """See `Hits`."""
        k = min(k, self._num_documents)
        hits = Hits(np.full((len(queries), k), -1, np.int64), np.zeros((len(queries), k)))
        counts = [Counter(query) for query in queries]
        asked = [number for number, count in enumerate(counts) if 0 < len(count) <= self._most_clauses]
        for first in range(0, len(asked), QUERIES_A_REQUEST):
            some = asked[first : first + QUERIES_A_REQUEST]
            for number, scores in zip(some, self._ask([counts[number] for number in some], k), strict=True):
                _fill(hits, number, scores)
        for number, count in enumerate(counts):
            if len(count) > self._most_clauses:
                _fill(hits, number, self._search_in_parts(count, k))
        return hits

    def _search_in_parts(self, query: Counter, k: int) -> dict[int, float]:
        """The threshold algorithm (Fagin, Lotem and Naor, PODS 2001): the best of each part, ever more of them, until
        the K-th sum is above what one that is among the best of no part can reach."""
        terms, step = list(query), max(self._most_clauses - 1, 1)  # one clause is for the filter
        parts = [Counter({t: query[t] for t in terms[i : i + step]}) for i in range(0, len(terms), step)]
        depth = k
        while True:
            found = self._ask(parts, depth)
            rows = sorted(set().union(*found))
            sums = dict.fromkeys(rows, 0.0)
            for first in range(0, len(rows), IDS_A_REQUEST):
                some = rows[first : first + IDS_A_REQUEST]
                for scores in self._ask(parts, len(some), some):
                    for row, score in scores.items():
                        sums[row] += score
            best = sorted(sums.values(), reverse=True)[:k]
            reach = sum(min(scores.values()) for scores in found if len(scores) == depth)
            if reach == 0 or depth == self._num_documents or (len(best) == k and best[-1] > reach):
                return sums
            depth = min(4 * depth, self._num_documents)

    def _ask(self, queries: list[Counter], k: int, rows: list[int] | None = None) -> list[dict[int, float]]:
        """{row: score} of the best of each query, of all documents or of those at `rows`."""
        answers = self._client.search(self._name, [_disjunction(query, k, rows) for query in queries])
        return [{int(hit["_id"]): hit["_score"] for hit in found} for found in answers]

    def explain(self, query: list[str], row: int) -> dict[str, float]:
        """What each term of the query adds to the score of one document; terms that it lacks are left out."""
        found = self._ask([Counter({term: count}) for term, count in Counter(query).items()], 1, [row])
        return {term: scores[row] for term, scores in zip(Counter(query), found, strict=True) if scores}


def _fill(hits: Hits, number: int, scores: dict[int, float]) -> None:
    """The best of these documents become the hits of a query."""
    best = sorted(scores, key=lambda row: (-scores[row], row))[: hits.rows.shape[1]]
    hits.rows[number, : len(best)], hits.scores[number, : len(best)] = best, [scores[row] for row in best]


def _disjunction(query: Counter, k: int, rows: list[int] | None = None) -> dict:
    clauses = [{"term": {"text": {"value": term, "boost": float(count)}}} for term, count in query.items()]
    bool_ = {"should": clauses}
    if rows is not None:
        bool_ |= {"filter": {"ids": {"values": list(map(str, rows))}}, "minimum_should_match": 1}
    return {"query": {"bool": bool_}, "size": k, "_source": False, "track_total_hits": False}


class Client:
    """The few requests that are needed. Raises InputError where the server does not answer or answers with an error."""

    def __init__(self, address: str):
        self.address = address.rstrip("/")

    def count(self, name: str) -> int | None:
        """Documents of an index, None where there is none."""
        answer = self._ask("GET", f"/{name}/_count", missing=None)
        return None if answer is None else answer["count"]

    def delete(self, name: str) -> None:
        self._ask("DELETE", f"/{name}", missing={})

    def create(self, name: str, num_documents: int, k1: float, b: float) -> None:
        settings = {
            "number_of_shards": 1,  # one df for all documents
            "number_of_replicas": 0,
            "refresh_interval": -1,
            "max_result_window": max(MOST_HITS, num_documents),
            "similarity": {"default": {"type": "BM25", "k1": k1, "b": b}},
            "analysis": {"analyzer": {"default": {"type": "whitespace"}}},
        }
        mappings = {"properties": {"text": {"type": "text", "index_options": "freqs"}}}
        self._ask("PUT", f"/{name}", {"settings": settings, "mappings": mappings})

    def add(self, name: str, documents: list[tuple[int, str]]) -> None:
        lines = [line for row, text in documents for line in ({"index": {"_id": str(row)}}, {"text": text})]
        answer = self._ask("POST", f"/{name}/_bulk", lines)
        if answer["errors"]:
            error = next(item["index"]["error"] for item in answer["items"] if "error" in item["index"])
            raise InputError(f"{self.address}: a document was refused: {_reason(error)}")

    def refresh(self, name: str) -> None:
        self._ask("POST", f"/{name}/_refresh")

    def most_clauses(self) -> int:
        answer = self._ask("GET", "/_cluster/settings?include_defaults=true&flat_settings=true")
        levels = (answer.get(level, {}) for level in ("transient", "persistent", "defaults"))
        values = [level["indices.query.bool.max_clause_count"] for level in levels
                  if "indices.query.bool.max_clause_count" in level]  # fmt: skip
        return int(values[0]) if values else 1024

    def search(self, name: str, bodies: list[dict]) -> list[list[dict]]:
        """Hits of each query: all of them, or an error."""
        for attempt in range(TRIES):
            answer = self._ask("POST", f"/{name}/_msearch", [line for body in bodies for line in ({}, body)])
            responses = answer.get("responses", [])
            failed = next((r for r in responses if "error" in r or r.get("timed_out") or _lost_shards(r)), None)
            if failed is None and len(responses) == len(bodies):
                return [response["hits"]["hits"] for response in responses]
            if failed and "error" in failed and failed.get("status", 500) not in RETRIED:
                break
            if attempt + 1 < TRIES:
                time.sleep(SECONDS_BETWEEN * 2**attempt)
        reason = (
            "fewer answers than queries"
            if failed is None
            else _reason(failed.get("error", "it timed out or a shard is lost"))
        )
        raise InputError(f"{self.address}: a query failed: {reason}; no hits were taken from it")

    def _ask(self, method: str, path: str, body: dict | list | None = None, **missing) -> dict:
        """The JSON answer; what `missing` says for status 404, if it is given."""
        data, kind = None, "application/json"
        if isinstance(body, list):
            data, kind = "".join(json.dumps(line) + "\n" for line in body).encode(), "application/x-ndjson"
        elif body is not None:
            data = json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": kind}, method=method)
        for attempt in range(TRIES):
            try:
                with urllib.request.urlopen(request, timeout=SECONDS_A_REQUEST) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                if error.code == 404 and "missing" in missing:
                    return missing["missing"]
                reason = f"{error.code}: {_reason_of(error)}"
                if error.code not in RETRIED:
                    break
            except (OSError, ValueError) as error:  # refused, reset, timed out, not JSON
                reason = getattr(error, "reason", None) or error
            if attempt + 1 < TRIES:
                time.sleep(SECONDS_BETWEEN * 2**attempt)
        raise InputError(
            f"{self.address}: {method} {path.split('?')[0]} failed ({reason}); start the server, or set TLM_OPENSEARCH "
            "to its address"
        )


def _lost_shards(response: dict) -> bool:
    return response.get("_shards", {}).get("failed", 0) > 0


def _reason(error: dict | str) -> str:
    return error.get("reason", str(error)) if isinstance(error, dict) else str(error)


def _reason_of(error: urllib.error.HTTPError) -> str:
    try:
        return _reason(json.load(error)["error"])
    except (ValueError, KeyError, TypeError, OSError):
        return error.reason
