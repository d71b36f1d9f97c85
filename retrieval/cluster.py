"""The engine scan on many machines, by Ray: a file is counted, and then scored, by whichever worker is free.

Files are read where they lie, by their own addresses; what comes back is counts, the K best of each file, and the texts
of what was found. Counts are added up over all files before the first is scored, and what is found is merged by score
and row, so that the result is scan's to the bit. A task keeps nothing: what a worker was at that died is done again by
another. What has been found is saved each minute, and when a file cannot be read: the same selection goes on there.
"""

import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from warnings import catch_warnings

import numpy as np

import retrieval
import tasks
from retrieval.analyze import Analyzer
from retrieval.corpus import Corpus, Document, Progress
from retrieval.engines import ENGINES, Hits, num_threads
from retrieval.engines.scan import SECONDS_A_SAVE, Stream, documents_at
from tasks.errors import InputError

TRIES = 5  # of a file whose worker dies; a file that kills each of them ends the search
AHEAD = 2  # tasks that are given out for each core


class Cluster:
    """As an engine, see `retrieval.engines`. Raises InputError where Ray is not installed or does not answer."""

    seconds, in_passes = 0.0, True

    def __init__(
        self,
        address: str,
        stream: Stream,
        analyzer: Analyzer,
        scoring: str,
        k1: float,
        b: float,
        folder: Path,
        threads: int = 0,
        progress: Progress | None = None,
    ):
        self._ray = connect(address, num_threads(threads))
        self._stream, self._progress = stream, progress
        self._scan = ENGINES["scan"](stream, analyzer, scoring, k1, b, folder, 1, progress)
        self._open = partial(ENGINES["scan"], analyzer=analyzer, scoring=scoring, k1=k1, b=b, folder=folder, threads=1)

    def count(self, queries: list[list[str]]) -> dict:
        """See `Scan.count`."""
        return self._scan.count(queries, counting=self._count)

    def search(self, queries: list[list[str]], k: int) -> Hits:
        """See `Hits`."""
        counts = self.count(queries)
        starts = np.cumsum([0, *counts["files"]])
        k = min(k, counts["documents"])
        found = Hits(np.full((len(queries), k), -1, np.int64), np.zeros((len(queries), k)))
        unfinished = self._scan.unfinished(queries, k, counts).with_suffix(".cluster.npz")
        left = set(np.flatnonzero(counts["files"]).tolist())
        if unfinished.exists():
            with np.load(unfinished) as saved:
                found, left = Hits(saved["rows"], saved["scores"]), set(saved["left"].tolist())

        def save() -> None:
            arrays = found._asdict() | {"left": np.array(sorted(left), np.int64)}

            def write(half: Path) -> None:
                with half.open("wb") as file:
                    np.savez(file, **arrays)

            self._scan.write(unfinished, write)

        given, saved = [self._ray.put(value) for value in (queries, counts)], time.monotonic()
        try:
            for number, hits in self._of_each(score_file, self._of_files(sorted(left)), given[0], k, given[1]):
                rows = np.where(hits.rows >= 0, hits.rows + starts[number], -1)
                found = merge(found, Hits(rows, hits.scores))
                left.remove(number)
                if self._progress:
                    self._progress(len(counts["files"]) - len(left), len(counts["files"]), "files scored")
                if time.monotonic() - saved > SECONDS_A_SAVE:
                    save()
                    saved = time.monotonic()
        except InputError:
            save()
            raise
        unfinished.unlink(missing_ok=True)
        return found

    def fetch(self, rows: np.ndarray, folder: Path) -> tuple[Corpus, np.ndarray]:
        """See `Stream.fetch`."""
        paths = self._ray.put(self._stream.paths)

        def reading(_, numbers: list[int], inner: list[list[int]]) -> Iterator[list[Document]]:
            jobs = dict(zip(numbers, zip(numbers, inner, strict=True), strict=True))
            ready = dict(self._of_each(fetch_file, jobs, paths))
            return (ready[number] for number in numbers)

        return self._stream.fetch(rows, folder, reading)

    def explain_text(self, query: list[str], text: str) -> dict[str, float]:
        """See `Scan.explain_text`."""
        return self._scan.explain_text(query, text)

    def _count(self, queries: list[list[str]]) -> dict:
        files, given = [0] * len(self._stream.paths), self._ray.put(queries)
        documents, words, df, most = 0, 0, {}, {}
        for done, (number, part) in enumerate(self._of_each(count_file, self._of_files(range(len(files))), given), 1):
            files[number] = part["documents"]
            documents, words = documents + part["documents"], words + part["words"]
            df = {term: df.get(term, 0) + part["df"][term] for term in part["df"]}
            for length, count in part["most_counts"]:
                most[length] = max(most.get(length, 0), count)
            if self._progress:
                self._progress(done, len(files), "files counted")
        return {"documents": documents, "words": words, "df": df, "most_counts": sorted(most.items()), "files": files}

    def _of_files(self, numbers: Iterable[int]) -> dict[int, tuple]:
        return {number: (self._open, self._stream.paths[number]) for number in numbers}

    def _of_each(self, function, jobs: dict[int, tuple], *arguments) -> Iterator[tuple[int, object]]:
        """(number of a file, function(*its job, *arguments)), in the order in which they are ready."""
        task = self._ray.remote(num_cpus=1, max_retries=TRIES)(function)
        left, waiting = iter(jobs.items()), {}
        while True:
            room = AHEAD * int(self._ray.cluster_resources().get("CPU", 1)) - len(waiting)
            for number, job in islice(left, max(room, 0)):
                waiting[task.remote(*job, *arguments)] = number
            if not waiting:
                return
            (ready,), _ = self._ray.wait(list(waiting), num_returns=1)
            try:
                result = self._ray.get(ready)
            except self._ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, InputError):  # others run to their end: cancelling can crash Ray 2.60 here
                    raise InputError(str(error.cause)) from None
                raise
            except self._ray.exceptions.RayError as error:
                path, reason = self._stream.paths[waiting[ready]], str(error).split("\n")[0]
                raise InputError(f"{path}: {TRIES + 1} workers died of it ({reason}); give them memory") from error
            yield waiting.pop(ready), result


def count_file(open_scan, path: str, queries: list[list[str]]) -> dict:
    return open_scan(Stream(path)).count_part(queries)


def score_file(open_scan, path: str, queries: list[list[str]], k: int, counts: dict) -> Hits:
    return open_scan(Stream(path)).search_part(queries, k, counts)


def fetch_file(number: int, rows: list[int], paths: list[str]) -> list[Document]:
    return documents_at(paths, number, rows)


def merge(one: Hits, other: Hits) -> Hits:
    """The K best of both; rows are no two the same."""
    rows, scores = (np.concatenate(columns, axis=1) for columns in zip(one, other, strict=True))
    order = np.lexsort((rows, -scores), axis=1)[:, : one.rows.shape[1]]
    return Hits(np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1))


def connect(address: str, threads: int):
    """The module ray, connected. `auto`: to the cluster that this machine is of, or else to its own cores.

    Machines of a cluster get these packages from here; what they import must be installed there.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "retrieval.cluster needs the package ray: pip install -c constraints.txt -e '.[ray]'"
        ) from error
    if ray.is_initialized():
        return ray
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    packages = {"py_modules": [str(Path(package.__file__).parent) for package in (retrieval, tasks)]}
    try:
        with catch_warnings(action="ignore"):
            ray.init(address, runtime_env=packages, **quiet)
    except (ConnectionError, ValueError) as error:
        if address != "auto":
            raise InputError(f"retrieval.cluster={address}: no Ray answers there; start it with `ray start`") from error
        ray.init(num_cpus=threads, include_dashboard=False, **quiet)
    return ray
