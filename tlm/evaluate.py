"""Scores of a model on labelled texts: on dev while it trains, on test once at the end."""

import json

import numpy as np
import torch
from torch import nn

from tasks import metrics
from tasks.types import Task
from tlm.batches import pack
from tlm.engine import ALONE, World
from tlm.objectives import Masking, Source

TOKENS_PER_BATCH = 4096


def batches_by_length(lengths: np.ndarray, tokens_per_batch: int = TOKENS_PER_BATCH) -> list[np.ndarray]:
    """Indices cut into batches of like length, each of at most `tokens_per_batch` tokens (or one text)."""
    order = np.argsort(lengths, kind="stable")
    batches, start = [], 0
    for end in range(1, len(order) + 1):
        if end == len(order) or lengths[order[start : end + 1]].sum() > tokens_per_batch:
            batches.append(order[start:end])
            start = end
    return batches


@torch.no_grad()
def probabilities(model: nn.Module, source: Source, world: World = ALONE) -> np.ndarray:
    """float64[size, labels]: the classification head's softmax for each example. Processes share the work."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    result = np.zeros((len(source), model.shape.num_labels))
    for batch in batches_by_length(source.lengths)[world.rank :: world.size]:
        packed = pack([source.sequence(i) for i in batch]).to(device)
        logits_NC = model.classify(model(packed), packed)
        result[batch] = logits_NC.double().softmax(-1).cpu().numpy()
    model.train(was_training)
    return np.array(world.sum(result.ravel())).reshape(result.shape)


@torch.no_grad()
def mlm_loss(model: nn.Module, source: Source, masking: Masking) -> float:
    """Mean masked-LM loss of a token."""
    was_training, device, total, masked = model.training, next(model.parameters()).device, 0.0, 0
    model.eval()
    for indices in batches_by_length(source.lengths):
        inputs, targets = zip(*(masking(source.sequence(i), "held out", i) for i in indices), strict=True)
        batch = pack(inputs, targets).to(device)
        total += model.mlm_loss_sum(model(batch)[batch.masked], batch.masked_tokens).item()
        masked += len(batch.masked)
    model.train(was_training)
    return total / masked


def scores(probabilities_NC: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
    """Cross-entropy `loss` and every metric of tasks.metrics, as fractions."""
    chosen = probabilities_NC[np.arange(len(labels_N)), labels_N]
    return {"loss": float(-np.log(np.maximum(chosen, 1e-12)).mean()), **metrics.scores(labels_N, probabilities_NC)}


def test_scores(task: Task, probabilities_NC: np.ndarray) -> dict:
    """Scores on test, with the 95% bootstrap interval of the task's metric."""
    gold = np.array(task.targets("test"))
    interval = metrics.bootstrap_interval(task.metric, gold, probabilities_NC.argmax(1), len(task.labels))
    return {**scores(probabilities_NC, gold), f"{task.metric}_interval": list(interval)}


def prediction_lines(task: Task, probabilities_NC: np.ndarray) -> str:
    """A JSON line for each test text: id, label, prediction, probabilities."""
    lines = []
    for example, row in zip(task.splits["test"], probabilities_NC, strict=True):
        shares = {label: round(float(p), 6) for label, p in zip(task.labels, row, strict=True)}
        line = {
            "id": example.id,
            "label": example.label,
            "prediction": task.labels[int(row.argmax())],
            "probabilities": shares,
        }
        lines.append(json.dumps(line))
    return "\n".join(lines) + "\n"
