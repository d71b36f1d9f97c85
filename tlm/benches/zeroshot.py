"""`tlm bench zeroshot`: choices a second of `tlm eval` beside lm-eval's model of the same run, exported, in one run.

Both are handed the same choices behind the same rendered prompts, as text, and tokenize in their time. Instances that
do not fit the window are left out: each would cut them in its own way. lm-eval is asked as its own tasks ask it, by
`HFLM.loglikelihood`, a request for each choice, with each number of requests at once that `batch` names. Times are
processor time. The scores are compared as well, and so are accuracies, task by task.
"""

import importlib.util
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch

from tasks.errors import InputError
from tasks.pool import Instance, open_pool
from tasks.prompts import Prompted
from tlm.benches import rounds
from tlm.config import ZeroshotConfig
from tlm.engine import quiet
from tlm.export import export_run
from tlm.instances import open_instances, pool_sha256
from tlm.progress import Progress
from tlm.run import environment, write_json
from tlm.zeroshot import Run, open_run, refuse_seen, some, with_choices

OURS = "tlm"


def bench(config: ZeroshotConfig) -> int:
    if not importlib.util.find_spec("lm_eval"):
        raise InputError("tlm bench zeroshot: needs lm-eval; get it by pip install -c constraints.txt lm-eval")
    config = replace(config, threads=config.threads or torch.get_num_threads())
    run, progress = open_run(config.run), Progress()
    if not isinstance(run, Run):
        raise InputError(f"{config.run}: is a bi-encoder, which lm-eval cannot ask; name a generative run")
    found, left = questions(run, config, progress)
    prompted, tasks = [p for _, p in found], [i.task for i, _ in found]
    choices = sum(len(p.answers) for p in prompted)
    progress.say(f"{len(found)} instances of {len(set(tasks))} tasks, {choices} choices; {left} do not fit the window")
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            export_run(config.run, f"{folder}/model", None)  # raises where transformers has no such model
        contestants = {OURS: partial(ours, config.run, prompted, tasks)} | {
            f"lm-eval, batch {size}": partial(theirs, f"{folder}/model", prompted, size) for size in config.batch
        }
        records = rounds.contest("zero-shot", contestants, config.seconds, config.threads, ["tlm.zeroshot"], progress)
    rows = list(rows_of(records, prompted, tasks, Path(config.run).name))
    if config.out:
        write_json(Path(config.out), {"machine": environment() | {"threads": config.threads}, "rows": rows})
    rounds.show(rows, "metric", "engine")
    return 0


def questions(run: Run, config: ZeroshotConfig, progress: Progress) -> tuple[list[tuple[Instance, Prompted]], int]:
    """Rendered instances that are read whole, at most `limit` a task, and how many are not."""
    pool = open_pool(config.pool)
    tasks = pool.select(config.categories)
    refuse_seen(run, pool, tasks)
    tasks = with_choices(pool, tasks, config.categories, progress)
    with progress.phase("pool"):
        instances = open_instances(pool, pool_sha256(pool), Path(config.cache).expanduser(), progress.update)
    rows = [row for task in tasks for row in some(instances.rows(task.name, "test"), config.limit)]
    asked = [(i, run.prompted(i, pool.tasks[i.task])) for i in (instances[row] for row in rows)]
    found = [(i, p) for i, p in asked if read_whole(run, p)]
    if not found:
        raise InputError(f"{pool.path}: no instance of {', '.join(config.categories)} fits the window; name others")
    return found, len(asked) - len(found)


def read_whole(run: Run, prompted: Prompted) -> bool:
    text, *answers = run.reader.encode([prompted.text, *prompted.answers])
    longest = max(map(len, answers)) + 1
    return longest <= run.reader.most_answer and len(text) + 2 + longest <= run.reader.max_length


# --- the contestants, each in its process ----------------------------------------------------------------------------


def ours(run: str, prompted: Sequence[Prompted], tasks: Sequence[str]) -> Iterator[dict]:
    yield
    model = open_run(run)
    yield from turns(lambda: [by_rule["sum"] for by_rule in model.choice_scores(prompted, tasks, ("sum",))])


def theirs(folder: str, prompted: Sequence[Prompted], batch: int) -> Iterator[dict]:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    logging.disable(logging.WARNING)
    import transformers
    from lm_eval.api.instance import Instance as Request
    from lm_eval.models.huggingface import HFLM

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    model = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=batch)
    ends = np.cumsum([len(p.answers) for p in prompted])
    pairs = [(f"[CLS] {p.text} [SEP]", f" {answer} [SEP]") for p in prompted for answer in p.answers]

    def scores() -> list[np.ndarray]:
        requests = [Request("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
        found = [log_p for log_p, _ in model.loglikelihood(requests, disable_tqdm=True)]
        return np.split(np.array(found), ends[:-1])

    yield from turns(scores)


def turns(scores: Callable[[], list[np.ndarray]]) -> Iterator[dict]:
    while True:
        start = time.process_time()
        found = scores()
        yield {"seconds": time.process_time() - start, "scores": found}


# --- what came of them ------------------------------------------------------------------------------------------------


def rows_of(
    records: dict[str, rounds.Record], prompted: Sequence[Prompted], tasks: Sequence[str], case: str
) -> Iterator[dict]:
    mine = records[OURS].turns
    for engine, record in records.items():
        scores = record.turns[0]["scores"]
        right = [float(s.argmax() == p.gold) for s, p in zip(scores, prompted, strict=True)]
        by_task: dict[str, list[float]] = {}
        for task, value in zip(tasks, right, strict=True):
            by_task.setdefault(task, []).append(value)
        apart = max(float(np.abs(a - b).max()) for a, b in zip(scores, mine[0]["scores"], strict=True))
        times = [turn["seconds"] / of_ours["seconds"] for turn, of_ours in zip(record.turns, mine, strict=True)]
        for metric, value, unit in (
            ("choices/s", sum(map(len, scores)) / median(turn["seconds"] for turn in record.turns), "choices/s"),
            ("times the seconds of tlm", median(times), "x"),
            ("accuracy, mean over tasks", fmean(map(fmean, by_task.values())), "percent"),
            ("largest difference of a score", apart, "number"),
        ):
            yield rounds.row("zeroshot", case, engine, metric, value, unit, len(record.turns))
