"""`tlm retrieve`: a task's selection, written where the user wants it, and a look at it."""

import shutil
from pathlib import Path

from retrieval.corpus import is_store
from retrieval.engines.scan import Stream
from retrieval.folders import holds
from retrieval.select import KIND
from tasks.errors import InputError
from tlm.config import RetrieveConfig
from tlm.ledger import Ledger
from tlm.prepare import open_corpus, open_task, select_for
from tlm.progress import Progress
from tlm.run import read_json
from tlm.selections import sample_head, score_rows, sentences, source_rows

LAST = "manifest.json"  # its existence means that the folder is whole


def retrieve(config: RetrieveConfig) -> int:
    out, cache, progress = Path(config.out), Path(config.cache).expanduser(), Progress()
    if out.exists() and not holds(out, KIND) and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: is not an empty folder and holds no selection; choose another out=DIR")
    tasks = [open_task(spec.strip(), config.data) for spec in specs(config.task)]
    quota = parse_quota(config.quota, len(tasks))
    if config.retrieval.engine == "scan" and config.retrieval.selector == "bm25" and not is_store(config.corpus):
        corpus = Stream(config.corpus)
    else:
        corpus = open_corpus(config.corpus, cache, Ledger(), progress)
    with progress.phase("retrieval"):
        selection = select_for(tasks, corpus, config, cache, progress, quota)
    out.mkdir(parents=True, exist_ok=True)
    last_time = read_json(out / LAST)["files"] if (out / LAST).exists() else ()
    for name in set(last_time) - set(selection.manifest["files"]):
        (out / name).unlink(missing_ok=True)
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


def specs(task: str) -> list[str]:
    """The tasks that `task=` names, with commas between; a comma may also stand in the name of a file."""
    if Path(task).expanduser().exists():
        return [task]
    if not all(spec.strip() for spec in task.split(",")):
        raise InputError(f"task={task}: a name is missing beside a comma")
    return task.split(",")


def parse_quota(quota: str | None, num_tasks: int) -> list[float] | None:
    if quota is None:
        return None
    try:
        numbers = [float(part) for part in quota.strip("[]").split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != num_tasks or not all(0 < number < float("inf") for number in numbers):
        raise InputError(f"quota={quota}: give a number above 0 for each of the {num_tasks} tasks, such as 2,1,1")
    return numbers


def show(manifest: dict) -> None:
    """What a person wants to see: what was found, by source and query, how well, what was dropped, and samples."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    title = f"{manifest['documents']:,} documents, {manifest['words']:,} words"
    table = Table("source", "documents", "words", "", title=title)
    for column in table.columns[1:3]:
        column.justify = "right"
    for source, documents, words, share in source_rows(manifest):
        table.add_row(source, documents, words, bar(share))
    console.print(table)
    for sentence in sentences(manifest):
        console.print(sentence, soft_wrap=True, markup=False, highlight=False)
    if "scores" in manifest:
        table = Table("scores", "documents", "")
        for column in table.columns[:2]:
            column.justify = "right"
        for step, documents, share in score_rows(manifest):
            table.add_row(step, documents, bar(share))
        console.print(table)
    table = Table("sample", "fetched by", show_lines=True)
    for sample in manifest["samples"]:
        fetched = sample["query"]
        table.add_row(
            Text(f"{sample_head(sample)}: {sample['text']}"),
            Text(f"{fetched['id']}: {fetched['text']}" if fetched else "no text"),
        )
    console.print(table)


def bar(share: float) -> str:
    return "█" * round(20 * share)
