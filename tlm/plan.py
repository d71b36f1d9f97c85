"""`--dry-run`: what a configuration would do, before anything is written.

Sizes are those of the data as it lies there; lengths in tokens are estimated from words (1.4 tokens a word, as measured
on English with 8,192 word pieces), and time from matrix products on the CPU or GPU that would train, at half their peak
measured here (on a GPU small models may stay far below that: not run). Memory is that of the steps of one process in
fp32 (with micro_batch=auto as with none), without what selecting documents takes before them; three reference runs took
13 to 26% more.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from tasks.errors import InputError
from tasks.files import expand
from tasks.types import Task
from tlm import warmstart
from tlm.config import ModelConfig, StageConfig, TrainConfig, rows_of
from tlm.doctor import peak_flops
from tlm.engine import device_of
from tlm.ledger import paper_flops
from tlm.lowbit import in_shape
from tlm.memory import activation_bytes, optimizer_bytes
from tlm.mixture import EXTERNAL, LEAST_TEXTS, TASK
from tlm.model import ModelShape, layer_weights, training_flops
from tlm.optimizers import muon_flops
from tlm.prepare import NO_TASK, arm_of, open_task

TOKENS_PER_WORD = 1.4
EXPECTED_MFU = 0.5
COVERED, LENGTHS = 0.95, (128, 512)  # share of the training texts that are read whole; bounds of `model.max_length`
BALANCE = {"macro_f1": 0.5}  # such a metric counts each label alike, so that its optimum does not follow their shares
LEAST_WORDS = 100_000  # of a selection
# Scores of dev in a stage whose steps follow from the budget. The weights kept are the last stage's; half of the runs'
# seconds went into ten scorings.
EVALUATIONS, EVALUATIONS_BEFORE = 5, 2
BASE_BYTES = {"nf4": 0.5 + 4 / 64, "fp4": 0.5 + 4 / 64, "int8-weight": 1}  # a weight, with its share of the scale
LIBRARIES_BYTES = 560 << 20  # of a process that has loaded all that a run loads, and no data (measured on a CPU)


def plan(config: TrainConfig) -> dict:
    """Everything that `--dry-run` prints beside the configuration."""
    if config.task == NO_TASK.name or (config.init_from or "").startswith("hf:"):
        what = "task=none" if config.task == NO_TASK.name else "a checkpoint of transformers"
        raise InputError(f"--dry-run: has no plan for {what}; leave --dry-run out")
    task, device = open_task(config.task, config.data), device_of(config.device)
    asked = {name: value for name, _, value, _ in rows_of(config)}
    config = fitted(config, task)
    decided = {name: value for name, _, value, _ in rows_of(config) if value != asked[name]}
    lengths = {split: mean_length(task.texts(split), config.model.max_length) for split in task.splits}
    found = {"task": task.name, "metric": task.metric, "labels": len(task.labels)}
    found |= {
        split: f"{len(examples)} texts, about {lengths[split]:.0f} tokens each"
        for split, examples in task.splits.items()
    }
    if config.corpus:
        files = expand(config.corpus)
        local = [f for f in files if os.path.exists(f)]
        size = f", {sum(map(os.path.getsize, local)) / 1e6:,.1f} MB" if len(local) == len(files) else ""
        found["corpus"] = f"{len(files)} files{size}"
    result = {"arm": arm_of(config), "data": found}
    if decided:
        result["left_open"] = decided  # what the task and the budget decide
    if result["arm"] == "tfidf":
        return result

    shape, costs = shape_of(config, task), stage_costs(config, task)
    inside, heads = shape.layers * layer_weights(shape), 2 * shape.hidden**2 + shape.vocabulary
    adapters = shape.layers * shape.rank * (8 * shape.hidden + 3 * shape.intermediate)
    parameters = inside + adapters + shape.vocabulary * shape.hidden + heads
    trained = adapters + heads if shape.rank else parameters
    of_layers = BASE_BYTES[config.precision] if shape.rank else 4
    flops, tokens = {"start": start_flops(config)}, {}
    for name, cost in costs.items():
        flops[name], tokens[name] = cost.flops, cost.tokens
    peak = peak_flops(device, config.precision, config.threads or os.cpu_count())
    minutes = {name: round(value / (EXPECTED_MFU * peak) / 60, 1) for name, value in flops.items()}
    memory = {
        "weights": round(4 * (parameters - inside) + of_layers * inside),
        "gradients": 4 * trained,
        "optimizer": optimizer_bytes(config.optimizer, trained, 0 if shape.rank else inside),
        "activations": max(cost.activations for cost in costs.values()),
        "libraries": LIBRARIES_BYTES,
    }
    return result | {
        "model": {
            "parameters": parameters,
            "parameters_without_embeddings": parameters - shape.vocabulary * shape.hidden,
        },
        "tokens": tokens,
        "flops": flops | {"paper": paper_flops(parameters, tokens["joint"])},
        "device": f"{device}, {peak / 1e9:,.0f} GFLOP/s in matrix products",
        "estimated_minutes": minutes,
        "estimated_peak_memory_mib": {name: round(size / 2**20) for name, size in memory.items()}
        | {"all": round(sum(memory.values()) / 2**20)},
        "estimated_money": round(config.price_per_hour * sum(minutes.values()) / 60, 2),
    }


@dataclass(frozen=True)
class StageCost:
    flops: int
    tokens: int
    activations: int  # bytes


def stage_costs(config: TrainConfig, task: Task) -> dict[str, StageCost]:
    """Of both stages; FLOPs and tokens grow with the steps."""
    model, shape, costs = config.model, shape_of(config, task), {}
    alone = task is NO_TASK  # masked LM of the corpus in one stage
    task_length = 0 if alone else int(mean_length(task.texts("train"), model.max_length))
    by_muon = config.optimizer == "muon" and not shape.rank  # adapters are left to AdamW
    optimizer = muon_flops(model.hidden, model.intermediate, model.layers) if by_muon else 0
    stages = {"joint": config.joint} | ({} if alone else {"finetune": config.finetune})
    for name, stage in stages.items():
        joint = name == "joint"
        rho1 = config.joint.external_per_task if config.corpus and joint else 0
        shares = {EXTERNAL: 1.0} if alone else {TASK: 1 / (rho1 + 1)} | ({EXTERNAL: rho1 / (rho1 + 1)} if rho1 else {})
        flops = tokens = activations = 0
        for source, often in shares.items():
            length = task_length if source == TASK else model.max_length
            texts = texts_a_batch(stage, source, length)
            rate = config.joint.task_mask_rate if source == TASK else config.joint.mask_rate
            masked = round(texts * length * rate) if joint else 0
            flops += often * training_flops(shape, [length] * texts, masked, texts * (source == TASK))
            tokens += often * texts * length
            at_once = texts * length if config.micro_batch in ("none", "auto") else int(config.micro_batch)
            share = min(1.0, at_once / (texts * length))
            needed = activation_bytes(
                shape, round(share * texts * length), length, round(share * masked), config.activation_checkpointing
            )
            activations = max(activations, needed)
        micro_batches = stage.steps * (1 - 3 / 8 * stage.batch_ramp) * stage.accumulation  # a ramp's mean batch is 5/8
        costs[name] = StageCost(
            flops=round(micro_batches * flops) + stage.steps * optimizer,
            tokens=round(micro_batches * tokens),
            activations=activations,
        )
    return costs


def fitted(config: TrainConfig, task: Task) -> TrainConfig:
    """With a length, steps and a bound of the selection that suit the task, where the configuration leaves them open.

    More text than is read would only be text further from the task. Steps of a budget are an estimate here.
    """
    model, retrieval = config.model, config.retrieval
    config = replace(config, model=replace(model, max_length=length_for(model, task)))
    if task is NO_TASK or model.size == "tfidf":
        return config
    for name in ("joint", "finetune"):
        stage = getattr(config, name)
        if stage.balance is None:
            config = replace(config, **{name: replace(stage, balance=BALANCE.get(task.metric, 0.0))})
    config = with_mixture(config, task)
    if config.corpus and not (retrieval.max_words or retrieval.max_documents):
        rho1 = config.joint.external_per_task
        tokens = stage_costs(config, task)["joint"].tokens * rho1 / (rho1 + 1)
        retrieval = replace(retrieval, max_words=max(LEAST_WORDS, round(tokens / TOKENS_PER_WORD)))
    return replace(config, retrieval=retrieval)


def length_for(model: ModelConfig, task: Task) -> int:
    """`model.max_length`, or the tokens that hold most of the task's training texts whole."""
    if model.max_length is not None:
        return model.max_length
    longest = np.quantile([tokens_of(text) for text in task.texts("train")] or [0], COVERED)
    return int(np.clip(-(-longest // 64) * 64, *LENGTHS))


def with_mixture(config: TrainConfig, task: Task) -> TrainConfig:
    """With the steps of a budget, and, where it is left open, rho1 such that the joint stage reads the task's texts
    `joint.task_passes` times: more often a small task is learnt by heart, and the rest is better spent on new text. A
    budget that does not pay for so many leaves none for new text, which in so few steps teaches less than labels do.
    """
    joint, asked = config.joint, config.joint.external_per_task
    rho1 = asked if asked is not None else 1
    for _ in range(1 if asked is not None else 4):  # the steps of a budget depend on the mixture, but little
        config = replace(config, joint=replace(joint, external_per_task=rho1))
        if config.budget:
            config = within_budget(config, task)
        passes = config.joint.steps * joint.accumulation / micro_batches_a_pass(config, config.joint, task)
        rho1 = max(1, round(passes / joint.task_passes) - 1)
        if config.budget and passes <= joint.task_passes:
            rho1 = 0
    return config


def micro_batches_a_pass(config: TrainConfig, stage: StageConfig, task: Task) -> float:
    """Task micro-batches that hold each training text once."""
    train = task.texts("train")
    return len(train) / texts_a_batch(stage, TASK, mean_length(train, config.model.max_length))


def texts_a_batch(stage: StageConfig, source: str, mean_length: float) -> int:
    """`stage.batch` texts, or as many as hold about `stage.batch_tokens` tokens."""
    return stage.batch or max(LEAST_TEXTS[source], round(stage.batch_tokens / mean_length))


def within_budget(config: TrainConfig, task: Task) -> TrainConfig:
    """With about the steps that `budget` will pay for; training counts them anew, by the tokens. Raises InputError
    where it is too small for one step of the joint stage.
    """
    many = 1000  # the count is linear in the steps, but for rounding
    trial = replace(config, joint=replace(config.joint, steps=many), finetune=replace(config.finetune, steps=many))
    per_step = {stage: cost.flops / many for stage, cost in stage_costs(trial, task).items()}
    a_pass = micro_batches_a_pass(config, config.finetune, task) if "finetune" in per_step else 0.0
    return with_steps(config, start_flops(config), per_step, a_pass)


def with_steps(config: TrainConfig, spent: float, per_step: dict[str, float], a_pass: float = 0.0) -> TrainConfig:
    """With the steps and dev scores that `budget` less `spent` pays for, at so many FLOPs a step of each stage.

    `a_pass`: micro-batches of the second stage that hold each training text once.
    """
    left, stages = config.budget - spent, {}
    second = config.finetune.share if "finetune" in per_step else 0.0
    if second and config.corpus and config.finetune.task_passes:
        most = config.finetune.task_passes * a_pass / config.finetune.accumulation
        second = min(second, most * per_step["finetune"] / left)
    for name, flops in per_step.items():
        steps = max(0, round((second if name == "finetune" else 1 - second) * left / flops))
        if name == "joint" and not steps:
            raise InputError(f"budget={config.budget:g}: too small for a step of the joint stage; raise it")
        eval_every = steps_between_scores(steps, last=name == list(per_step)[-1])
        stages[name] = replace(getattr(config, name), steps=steps, eval_every=eval_every)
    return replace(config, **stages)


def steps_between_scores(steps: int, last: bool) -> int:
    return max(1, -(-steps // (EVALUATIONS if last else EVALUATIONS_BEFORE)))


def start_flops(config: TrainConfig) -> int:
    """Of the embeddings' start, where as many words are counted as may be."""
    if config.init.method == "random" or config.init_from:
        return 0
    return warmstart.flops(config.tokenizer.vocabulary, config.model.hidden, config.init.max_words)


def shape_of(config: TrainConfig, task: Task) -> ModelShape:
    model = config.model
    return ModelShape(
        config.tokenizer.vocabulary,
        model.hidden,
        model.layers,
        model.heads,
        model.intermediate,
        model.max_length,
        len(task.labels),
        **in_shape(config),
    )


def mean_length(texts: Sequence[str], max_length: int) -> float:
    """Tokens a text."""
    return fmean(min(tokens_of(text), max_length) for text in texts)


def tokens_of(text: str) -> float:
    """About so many, [CLS] and [SEP] included."""
    return TOKENS_PER_WORD * (text.count(" ") + 1) + 2


def show(config: TrainConfig) -> None:
    """Print the resolved configuration and the plan as one YAML document."""
    import json

    from omegaconf import OmegaConf

    planned = plan(config)
    print(OmegaConf.to_yaml(OmegaConf.structured(config)), end="")
    print("plan:")
    print(OmegaConf.to_yaml(OmegaConf.create({"plan": json.loads(json.dumps(planned))})).split("\n", 1)[1], end="")
