"""The arms that are held against each other, and a run of any of them: one configuration but for one difference."""

import copy
from pathlib import Path

import numpy as np

from tlm.config import TrainConfig
from tlm.evaluate import prediction_lines, scores, test_scores
from tlm.ledger import Ledger
from tlm.prepare import arm_of, open_task
from tlm.progress import Progress
from tlm.run import Run, read_json, write_json, write_text

ARMS = ("tfidf", "scratch", "random", "tlm")


def as_arm(config: TrainConfig, arm: str) -> TrainConfig:
    """The configuration changed into an arm: no corpus, random documents, or the classical rival."""
    config = copy.deepcopy(config)
    config.retrieval.selector = "random" if arm == "random" else "bm25"
    if arm in ("tfidf", "scratch"):
        config.corpus = None
    if arm == "tfidf":
        config.model.size = "tfidf"
    return config


def run_name(config: TrainConfig) -> str:
    """Made from what runs: task, arm and seed."""
    stem = Path(config.task.rstrip("/")).name.split(".")[0].replace("hf:", "")
    return f"{stem}-{arm_of(config)}-{config.seed}"


def run(config: TrainConfig, progress: Progress | None = None) -> dict:
    """Run `config`, whichever arm it is; returns the summary."""
    config.run = config.run or run_name(config)
    if config.model.size == "tfidf":
        return run_tfidf(config, progress or Progress())
    if (config.init_from or "").startswith("hf:"):
        from tlm.hf import finetune

        return finetune(config, progress or Progress())
    from tlm.trainer import train

    return train(config, progress)


def run_tfidf(config: TrainConfig, progress: Progress) -> dict:
    """TF-IDF with logistic regression in an ordinary run folder."""
    from tlm import tfidf

    run = Run(Path(config.out) / config.run, config)
    if run.summary_path.exists():
        progress.say(f"{run.folder} is finished; its summary follows")
        return read_json(run.summary_path)
    task, ledger = open_task(config.task, config.data), Ledger()
    run.begin([dict(i) for i in task.inputs])
    data = {split: (task.texts(split), np.array(task.targets(split))) for split in ("train", "dev")}
    with progress.phase("tfidf"), ledger.phase("fit"):
        model = tfidf.fit(
            *data["train"], *data["dev"], task.labels, task.metric, seed=config.seed, threads=config.threads
        )
    dev = scores(model.probabilities(data["dev"][0]), data["dev"][1])
    with ledger.phase("test"):
        probabilities = model.probabilities(task.texts("test")) if config.test else None
    summary = {
        "name": run.folder.name,
        "task": task.name,
        "metric": task.metric,
        "labels": list(task.labels),
        "arm": "tfidf",
        "seed": config.seed,
        "dev": dev,
        "test": test_scores(task, probabilities) if config.test else None,
        "model": {"features": model.num_features, "C": model.strength, "class_weight": model.class_weight},
        "data": {
            "train_examples": len(data["train"][0]),
            "external_documents": 0,
            "external_tokens": 0,
            "report": task.report,
        },
        "selection": None,
        "cost": ledger.cost(0, config.price_per_hour),
        "config_sha256": run.config_sha256,
    }
    if config.test:
        write_text(run.folder / "predictions.jsonl", prediction_lines(task, probabilities))
    write_json(run.summary_path, summary)
    return summary
