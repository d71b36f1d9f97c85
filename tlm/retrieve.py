"""`tlm retrieve`: a task's selection, written where the user wants it, and a look at it."""

import shutil
from pathlib import Path

from retrieval.corpus import is_store
from retrieval.engines.scan import Stream
from tasks.errors import InputError
from tlm.config import RetrieveConfig
from tlm.ledger import Ledger
from tlm.prepare import open_corpus, open_task, select_for
from tlm.progress import Progress

LAST = "manifest.json"  # its existence means that the folder is whole


def retrieve(config: RetrieveConfig) -> int:
    out, cache, progress = Path(config.out), Path(config.cache).expanduser(), Progress()
    if out.exists() and any(out.iterdir()) and not (out / LAST).exists():
        raise InputError(f"{out}: is not empty and holds no selection; choose another out=DIR")
    task = open_task(config.task, config.data)
    if config.retrieval.engine == "scan" and config.retrieval.selector == "bm25" and not is_store(config.corpus):
        corpus = Stream(config.corpus)
    else:
        corpus = open_corpus(config.corpus, cache, Ledger(), progress)
    with progress.phase("retrieval"):
        selection = select_for(task, corpus, config, cache, progress)
    out.mkdir(parents=True, exist_ok=True)
    for source in sorted(selection.folder.iterdir(), key=lambda path: path.name == LAST):
        half = out / f".{source.name}"
        try:
            shutil.copyfile(source, half)
        except OSError as error:
            half.unlink(missing_ok=True)
            raise InputError(
                f"{out}: cannot be written ({error.strerror}); make room or choose another out=DIR"
            ) from None
        half.replace(out / source.name)
    show(selection.manifest)
    print(out / "selection.jsonl.gz")
    return 0


def show(manifest: dict) -> None:
    """What was found: by source, by query, what was dropped, and the terms that pulled most."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "source", "documents", "words", title=f"{manifest['documents']:,} documents, {manifest['words']:,} words"
    )
    for source, entry in sorted(manifest["by_source"].items(), key=lambda item: -item[1]["words"]):
        table.add_row(source, f"{entry['documents']:,}", f"{entry['words']:,}")
    console = Console()
    console.print(table)
    leaks = manifest["leaks"]
    console.print(f"{leaks['dropped']:,} documents that overlap with dev or test texts were dropped.")
    if "queries" in manifest:
        queries, hits = manifest["queries"], manifest["queries"]["hits"]
        console.print(
            f"{queries['number']:,} queries found {hits['fewest']} to {hits['most']} documents each, "
            f"{hits['median']:.0f} in the middle; {queries['without_hits']:,} found nothing.",
            soft_wrap=True,
        )
        console.print("terms that pulled most: " + ", ".join(manifest["terms"]), soft_wrap=True)
