"""`tlm bench train`: our training step beside a plain PyTorch loop and `transformers.Trainer`, on the CPU, in one run.

All contestants start from the same weights of one architecture, and go through the same texts with as many texts a
step. A turn (see rounds.py) is one epoch of `steps` optimizer steps over these texts.

Where a choice had to be made it favours the rivals: their texts are drawn and masked before their time starts and only
padded in it, while ours draws, masks and packs; the Trainer is timed from the beginning to the end of its epochs, its
set-up left out; denormal numbers are flushed for all.
"""

import contextlib
import difflib
import importlib.metadata
import importlib.util
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.profiler import ProfilerActivity, profile, record_function

from tasks.errors import InputError
from tasks.pool import open_pool
from tlm import engine as engines
from tlm import multitask
from tlm.batches import IGNORE
from tlm.benches import rounds
from tlm.config import (
    BenchConfig,
    InitConfig,
    JointConfig,
    ModelConfig,
    MultitaskConfig,
    PretrainConfig,
    PromptsConfig,
    TokenizerConfig,
    TrainConfig,
)  # fmt: skip
from tlm.doctor import peak_flops
from tlm.export import KINDS, apart
from tlm.export import config as modernbert_config
from tlm.ledger import Ledger
from tlm.mixture import EXTERNAL, TASK, Mixture
from tlm.model import Attention, ModelShape, Transformer, forward_flops
from tlm.multitask import PreparedPool
from tlm.objectives import Masking, Objective, Source
from tlm.optimizers import muon_flops
from tlm.precision import products
from tlm.prepare import open_task, prepare
from tlm.progress import Progress
from tlm.prompted import Example, PromptedObjective
from tlm.run import environment, write_json
from tlm.tokenizer import CLS, MASK, PAD, SEP, SPECIALS

# The defaults of `tlm train`, but for the mixture, that of the kept figures, and masks, as many as those of the rivals'
# own collator.
JOINT = JointConfig(external_per_task=3, mask_rate=0.15)
CYCLE = JOINT.external_per_task + 1  # steps from one task batch to the next
NEVER = 10**9  # external batches before the task's turn, where there is no task
HEAD_DIM = 64  # of attention, as in ModernBERT
RATE_SHARE = 0.1  # of the peak learning rates: they do not change the speed, but a loss that is not a number might
OURS, BASELINE = "tlm muon", "hf trainer"
CPU = torch.device("cpu")
MACHINE = {"fp32": "machine", "bf16": "machine, bf16"}  # the peak of matrix products


# --- the work -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What a turn is: `steps` optimizer steps of `objective` on what `mixture` draws, once through all sources."""

    shape: ModelShape
    objective: Objective | PromptedObjective
    mixture: Mixture
    steps: int

    def turn(self, nth: int) -> range:
        """The optimizer steps of the `nth` turn."""
        return range(nth * self.steps, (nth + 1) * self.steps)

    @property
    def tokens(self) -> int:
        """Real tokens of a turn, [CLS] and [SEP] included."""
        return int(sum(source.lengths.sum() for source in self.objective.sources.values()))

    def flops(self, nth: int, muon: bool) -> int:
        """FLOPs that turn `nth` needs: no padding, MLM logits of masked tokens only, Muon's products if it is used."""
        shape, total = self.shape, 0
        for step in self.turn(nth):
            for micro in self.objective.step(self.mixture.draw(step)):
                batch = micro.batch.under(shape.attention)
                texts = len(batch) if micro.task and batch.labels is not None else 0
                total += 3 * forward_flops(shape, batch.lengths, len(batch.masked), texts, batch.attended)
        return total + muon * self.steps * muon_flops(shape.hidden, shape.intermediate, shape.layers)


def make_job(config: BenchConfig, sources: dict[str, Source], hidden: int, vocabulary: int) -> Job:
    """`sources` are where the texts are drawn from: EXTERNAL, and TASK where the task has its share of the steps."""
    shape = ModelShape(
        vocabulary=vocabulary, hidden=hidden, layers=config.layers, heads=hidden // HEAD_DIM, intermediate=2 * hidden,
        max_length=config.max_length, num_labels=int(sources[TASK].labels.max()) + 1 if TASK in sources else 2,
    )  # fmt: skip
    steps = {EXTERNAL: config.steps}
    if TASK in sources:
        steps = {EXTERNAL: config.steps - config.steps // CYCLE, TASK: config.steps // CYCLE}
    batch = {name: max(1, round(config.batch_tokens / source.lengths.mean())) for name, source in sources.items()}
    drawn = {name: sample(source, steps[name] * batch[name], config.seed) for name, source in sources.items()}
    mixture = Mixture(
        seed=config.seed,
        sizes={name: len(source) for name, source in drawn.items()},
        batch=batch,
        external_per_task=JOINT.external_per_task if TASK in sources else NEVER,
    )
    masking = Masking(JOINT.mask_rate, vocabulary, len(SPECIALS), MASK, config.seed)
    return Job(shape, Objective(drawn, JOINT.mlm_weight, masking), mixture, config.steps)


@dataclass(frozen=True)
class Drawn:
    """Prompted examples in memory, as a PromptSource has them."""

    examples: list[Example]

    def __len__(self) -> int:
        return len(self.examples)

    def example(self, number: int) -> Example:
        return self.examples[number]

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.array([len(example.inputs) for example in self.examples])

    @cached_property
    def answers(self) -> np.ndarray:
        return np.array([example.answer + 1 for example in self.examples])


def multitask_job(config: BenchConfig, prepared: PreparedPool, hidden: int) -> Job:
    """The first `steps` steps of `tlm pretrain`, over and over; causal, for transformers has no prefix attention."""
    (stage,) = multitask.stages(pretrain_config(config), prepared, engines.ALONE)
    batch = stage.mixture.batch[TASK]
    numbers = stage.mixture.examples_at(TASK, np.arange(config.steps * batch))
    drawn = Drawn([prepared.prompts.example(number) for number in numbers])
    sizes = ModelConfig(hidden=hidden, layers=config.layers, heads=hidden // HEAD_DIM, intermediate=2 * hidden,
                        max_length=config.max_length)  # fmt: skip
    mixture = Mixture(config.seed, {TASK: len(drawn)}, {TASK: batch}, 0)
    return Job(prepared.shape(sizes), PromptedObjective(drawn), mixture, config.steps)


def pretrain_config(config: BenchConfig) -> PretrainConfig:
    return PretrainConfig(
        pool=PromptsConfig(config.pool), attention="causal", cache=config.cache, seed=config.seed,
        tokenizer=TokenizerConfig(config.vocabulary), model=ModelConfig(max_length=config.max_length),
        init=InitConfig("random"), joint=MultitaskConfig(batch_tokens=config.batch_tokens, eval_every=0),
    )  # fmt: skip


def sample(source: Source, texts: int, seed: int) -> Source:
    """`texts` of them in memory, drawn without replacement, and again from the start where there are too few."""
    rows = np.resize(np.random.default_rng(seed).permutation(len(source)), texts)
    sequences = [source.sequence(i) for i in rows]
    return Source(sequences.__getitem__, source.lengths[rows], None if source.labels is None else source.labels[rows])


def cut(source: Source, texts: int, length: int) -> Source:
    """The same tokens end to end as `texts` texts of equal `length`."""
    flat = np.concatenate([source.sequence(i)[1:-1] for i in range(len(source))])
    rows = np.pad(np.resize(flat, (texts, length - 2)), ((0, 0), (1, 1)), constant_values=((0, 0), (CLS, SEP)))
    return Source(list(rows).__getitem__, np.full(texts, length))


def start_model(job: Job) -> Transformer:
    """The weights that all start from; scaled residuals, for layers that begin as the identity would hide an error."""
    return Transformer(job.shape, torch.Generator().manual_seed(job.mixture.seed), "scaled").train()


# --- the contestants ------------------------------------------------------------------------------------------------


def ours(job: Job, optimizer: str, precision: str = "fp32") -> Iterator:
    engines.launch()
    yield
    engine = our_engine(job, optimizer)
    with products(precision, CPU, job.shape.hidden):
        for nth in itertools.count():
            start = time.perf_counter()
            for step in job.turn(nth):
                our_step(engine, job, step)
            yield time.perf_counter() - start


def our_engine(job: Job, optimizer: str):
    engine = engines.initialize(job.objective.losses(start_model(job)), JOINT, optimizer, False, {})
    engines.set_rates(engine, JOINT, RATE_SHARE)
    return engine


def our_step(engine, job: Job, step: int) -> float:
    """One optimizer step as `tlm train` makes it, the gradient norm that it logs included; returns the loss."""
    with record_function("data"):
        (micro,) = job.objective.step(job.mixture.draw(step))
    sums = engine(micro.batch, micro.mlm > 0, micro.task > 0)
    loss = sum(weight * s for weight, s in zip((micro.mlm, micro.task), sums, strict=True) if s is not None)
    engine.backward(loss, scale_wrt_gas=False)
    with record_function("optimizer"):
        engines.gradient_norm(engine)
        engine.step()
    return loss.item()


def pytorch(job: Job) -> Iterator:
    """The loop that most people write: padded batches, AdamW, clipped gradients."""
    import transformers  # noqa: F401

    yield
    models = {head: rival_model(job, head) for head in heads(job)}
    optimizers = {head: torch.optim.AdamW(model.parameters()) for head, model in models.items()}
    for nth in itertools.count():
        batches = rival_batches(job, nth)
        start = time.perf_counter()
        for head, _, examples in batches:
            loss = models[head](**pad(examples)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(models[head].parameters(), JOINT.clip)
            optimizers[head].step()
            optimizers[head].zero_grad()
            loss.item()
        yield time.perf_counter() - start


def hf_trainer(job: Job, sparse: bool = False, **arguments: Any) -> Iterator:
    """`transformers.Trainer` as it comes, but for `arguments`; one epoch over the texts of each source and head.

    `sparse` sets ModernBERT's switch that computes logits at masked positions only.
    """
    import transformers
    from transformers import Trainer, TrainerCallback, TrainingArguments

    transformers.logging.set_verbosity_error()

    class Stopwatch(TrainerCallback):
        def on_epoch_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_epoch_end(self, *_, **__):
            self.seconds = time.perf_counter() - self.start

    yield
    models = {head: rival_model(job, head, sparse) for head in heads(job)}
    optimizers: dict[str, Any] = {}  # made by the first Trainers, kept by the next
    with tempfile.TemporaryDirectory() as folder:
        for nth in itertools.count():
            epochs: dict[tuple, list] = {}
            for head, source, examples in rival_batches(job, nth):
                epochs.setdefault((head, source, len(examples)), []).extend(examples)
            seconds = 0.0
            for (head, _, texts), examples in epochs.items():
                settings = TrainingArguments(
                    output_dir=folder, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
                    num_train_epochs=1, per_device_train_batch_size=texts, seed=job.mixture.seed + nth, **arguments,
                )  # fmt: skip
                watch = Stopwatch()
                trainer = Trainer(
                    models[head], settings, train_dataset=examples, data_collator=pad, callbacks=[watch],
                    optimizers=(optimizers.get(head), None),
                )  # fmt: skip
                trainer.train()
                optimizers[head], seconds = trainer.optimizer, seconds + watch.seconds
            yield seconds


def machine(job: Job, precision: str = "fp32") -> Iterator:
    """The peak of matrix products, in FLOP/s."""
    yield
    while True:
        yield peak_flops(CPU, precision, torch.get_num_threads())


def rounding(contestant: Callable[[Job], Iterator], job: Job) -> Iterator:
    """The same with products of bfloat16 numbers."""
    with products("bf16"):
        yield from contestant(job)


GROUPED = {"train_sampling_strategy": "group_by_length"}
RACE: dict[str, Callable[[Job], Iterator]] = {
    OURS: partial(ours, optimizer="muon"),
    "tlm adamw": partial(ours, optimizer="adamw"),
    "pytorch loop": pytorch,
    BASELINE: hf_trainer,
    "hf trainer, grouped": partial(hf_trainer, **GROUPED),
    "hf trainer, grouped, sparse": partial(hf_trainer, sparse=True, **GROUPED),
    MACHINE["fp32"]: machine,
}
if torch.cpu._is_amx_tile_supported():
    sparse = "hf trainer, grouped, sparse"
    RACE |= {f"{name}, bf16": partial(RACE[name], precision="bf16") for name in (OURS, MACHINE["fp32"])}
    RACE[f"{sparse}, bf16"] = partial(rounding, RACE[sparse])


def heads(job: Job) -> list[str]:
    if isinstance(job.objective, PromptedObjective):
        return ["causal"]
    return ["mlm", "classification"] if TASK in job.objective.sources else ["mlm"]


def rival_batches(job: Job, nth: int) -> list[tuple[str, str, list[dict]]]:
    """(head, source, examples) of each of a rival's steps in turn `nth`: our texts with our masks, and each task text
    once more, as it is, for the classifier, which is a model of its own there."""
    batches = []
    for step in job.turn(nth):
        (micro,) = job.mixture.draw(step)
        if isinstance(job.objective, PromptedObjective):
            batches.append(("causal", micro.source, [whole(job.objective.example(TASK, i)) for i in micro.examples]))
            continue
        source = job.objective.sources[micro.source]
        masked = [{"input_ids": inputs, "labels": targets} for inputs, targets in job.objective.examples(micro)]
        batches.append(("mlm", micro.source, masked))
        if micro.source == TASK:
            plain = [{"input_ids": source.sequence(i), "labels": source.labels[i]} for i in micro.examples]
            batches.append(("classification", TASK, plain))
    return batches


def whole(example: Example) -> dict[str, np.ndarray]:
    """Prompt and answer with the token that ends it, and what of it is to be predicted: transformers shifts."""
    inputs = np.append(example.inputs, example.targets[-1])
    return {"input_ids": inputs, "labels": np.append(IGNORE, example.targets)}


def pad(examples: list[dict]) -> dict[str, torch.Tensor]:
    """A batch as wide as its longest text: input_ids, attention_mask and labels."""
    rows = [torch.from_numpy(example["input_ids"]) for example in examples]
    labels = [torch.as_tensor(example["labels"]) for example in examples]
    padded = partial(pad_sequence, batch_first=True)
    return {
        "input_ids": padded(rows, padding_value=PAD),
        "attention_mask": padded([torch.ones_like(row) for row in rows]),
        "labels": padded(labels, padding_value=IGNORE) if labels[0].ndim else torch.stack(labels),
    }


def rival_model(job: Job, head: str, sparse: bool = False):
    """The same weights in transformers' own class, for "mlm", "classification" or "causal"."""
    import transformers

    specials = {f"{name[1:-1].lower()}_token": i for i, name in enumerate(SPECIALS)}
    labels = [str(i) for i in range(job.shape.num_labels)]
    values = modernbert_config(job.shape, labels, specials, head) | {"sparse_prediction": sparse}
    kind = transformers.ModernBertDecoderConfig if head == "causal" else transformers.ModernBertConfig
    model = getattr(transformers, KINDS[head].architecture)(kind.from_dict(values))
    tensors = {
        theirs + name.removeprefix(prefix): tensor
        for name, tensor in (apart if head == "causal" else dict)(start_model(job).state_dict()).items()
        for prefix, theirs in KINDS[head].heads.items()
        if name.startswith(prefix)
    }
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"decoder.weight"}, missing  # it is tied to the embeddings
    return model.train()


# --- where the time of our step goes --------------------------------------------------------------------------------

PARTS = ("attention", "matmuls", "MLM head", "optimizer", "data", "rest")
MATMULS = ("aten::mm", "aten::addmm")
HEAD_OPS = ("softmax", "nll_loss", "cross_entropy")


def ours_in_parts(job: Job, optimizer: str) -> Iterator:
    """Our turns under torch's profiler: seconds of each of PARTS. They add up to the turn's time, profiler included;
    what is in no operator (Python, DeepSpeed) counts as rest, beside embedding, norms and activations."""
    engines.launch()
    yield
    engine = our_engine(job, optimizer)
    model = engine.module.model
    for module, scope in [(m, "attention") for m in model.modules() if isinstance(m, Attention)] + [
        (model.mlm_head, "MLM head"), (model.decoder, "MLM head")]:  # fmt: skip
        name_scope(module, scope)
    for nth in itertools.count():
        with products("fp32", CPU, job.shape.hidden), profile(activities=[ProfilerActivity.CPU]) as profiler:
            start = time.perf_counter()
            for step in job.turn(nth):
                our_step(engine, job, step)
            seconds = time.perf_counter() - start
        parts = attribute(profiler.events())
        yield parts | {"rest": seconds - sum(parts.values())}


def name_scope(module: torch.nn.Module, name: str) -> None:
    """What `module` computes shows in a profile as lying inside an event called `name`."""
    open_scopes = []
    module.register_forward_pre_hook(lambda *_: open_scopes.append(record_function(name).__enter__()))
    module.register_forward_hook(lambda *_: open_scopes.pop().__exit__(None, None, None))


def attribute(events) -> dict[str, float]:
    """Self time in seconds of all events of a profile by part, but for the rest.

    A backward function has the sequence number of the forward operator that it belongs to, and goes where that went.
    """
    events = sorted(events, key=lambda event: event.time_range.start)
    backward = "autograd::engine::evaluate_function"
    scope_of_node: dict[int, str | None] = {}  # of operators with one number the last one made the graph's node
    for event in events:
        if event.sequence_nr >= 0 and not any(e.name.startswith(backward) for e in ancestors(event)):
            scope_of_node[event.sequence_nr] = next((e.name for e in ancestors(event) if e.name in PARTS), None)
    seconds = dict.fromkeys(PARTS[:-1], 0.0)
    for event in events:
        chain = list(ancestors(event))
        node = next((e for e in chain if e.name.startswith(backward)), None)
        scope = next((e.name for e in chain if e.name in PARTS), None)
        scope = scope or (scope_of_node.get(node.sequence_nr) if node else None)
        if scope in (None, "attention") and event.name in MATMULS:
            scope = "matmuls"
        elif scope is None and any(part in event.name for part in HEAD_OPS):
            scope = "MLM head"
        if scope:
            seconds[scope] += event.self_cpu_time_total / 1e6
    return seconds


def ancestors(event) -> Iterator:
    """The event and all that it lies in, from the inside out."""
    while event is not None:
        yield event
        event = event.cpu_parent


# --- cases ----------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    external: Source | None
    task: Source | None
    vocabulary: int
    pool: PreparedPool | None = None


def race(case: str, config: BenchConfig, data: Data, progress: Progress) -> Iterator[dict]:
    """Cases mlm, joint, multitask. Tokens and FLOPs are those that the task needs, for all: what the rivals do beside
    (padding, logits of tokens that are not masked, task texts twice as they have a model a head) does not count."""
    sources = {EXTERNAL: data.external} | ({TASK: data.task} if case == "joint" else {})
    for hidden in config.hidden:
        title, racing = f"{case} hidden={hidden}", RACE
        if case == "multitask":
            job, racing = multitask_job(config, data.pool, hidden), {n: r for n, r in RACE.items() if "sparse" not in n}
        else:
            job = make_job(config, sources, hidden, data.vocabulary)
        records = contest(title, {name: partial(run, job) for name, run in racing.items()}, config, progress)
        row = partial(rounds.row, "train", title, runs=len(records[OURS].turns))
        peaks = {precision: records.pop(name).turns for precision, name in MACHINE.items() if name in records}
        for precision, turns in peaks.items():
            yield row(MACHINE[precision], "speed", median(turns), "FLOP/s")
        for name, record in records.items():
            flops = [job.flops(1 + nth, muon="muon" in name) for nth in range(len(record.turns))]  # turn 0 warmed up
            peak = peaks["bf16" if name.endswith("bf16") else "fp32"]
            times, baseline = record.turns, records[BASELINE].turns
            yield row(name, "speed", median(job.tokens / t for t in times), "tokens/s")
            yield row(name, f"beside {BASELINE}", median(b / t for b, t in zip(baseline, times, strict=True)), "x")
            yield row(name, "mfu", median(f / t / p for f, t, p in zip(flops, times, peak, strict=True)), "share")
            if record.peak_memory is not None:
                yield row(name, "peak memory", record.peak_memory, "bytes")


def parts(case: str, config: BenchConfig, data: Data, progress: Progress) -> Iterator[dict]:
    """Means, since medians would not add up."""
    for hidden in config.hidden:
        job = make_job(config, {EXTERNAL: data.external, TASK: data.task}, hidden, data.vocabulary)
        contestants = {"plain": partial(ours, job, "muon"), "profiled": partial(ours_in_parts, job, "muon")}
        title = f"{case} hidden={hidden}"
        records = contest(title, contestants, config, progress)
        row = partial(rounds.row, "train", title, OURS, unit="s", runs=len(records["plain"].turns))
        means = {part: fmean(turn[part] for turn in records["profiled"].turns) / job.steps for part in PARTS}
        for part, value in means.items():
            yield row(part, value=value)
        yield row("step", value=sum(means.values()))
        yield row("unprofiled", value=fmean(records["plain"].turns) / job.steps)


def growth(case: str, config: BenchConfig, data: Data, progress: Progress) -> Iterator[dict]:
    """Twice and four times each of batch tokens, length, width, depth and vocabulary; masked LM, the first width."""
    hidden, vocabulary, sources = config.hidden[0], data.vocabulary, {EXTERNAL: data.external}
    jobs = {"base": make_job(config, sources, hidden, vocabulary)}
    for length in (config.max_length, 2 * config.max_length, 4 * config.max_length):
        texts = config.steps * max(1, round(config.batch_tokens / length))
        equal = {EXTERNAL: cut(jobs["base"].objective.sources[EXTERNAL], texts, length)}
        jobs[f"length={length}"] = make_job(replace(config, max_length=length), equal, hidden, vocabulary)
    for factor in (2, 4):
        for name in ("batch_tokens", "layers"):
            value = factor * getattr(config, name)
            jobs[f"{name}={value}"] = make_job(replace(config, **{name: value}), sources, hidden, vocabulary)
        jobs[f"hidden={factor * hidden}"] = make_job(config, sources, factor * hidden, vocabulary)
        jobs[f"vocabulary={factor * vocabulary}"] = make_job(config, sources, hidden, factor * vocabulary)
    records = contest(case, {name: partial(ours, job, "muon") for name, job in jobs.items()}, config, progress)
    for name in sorted(jobs, key=lambda name: (name != "base", name.split("=")[0])):
        record = records[name]
        row = partial(rounds.row, "train", f"{case} {name}", OURS, runs=len(record.turns))
        yield row("step", median(record.turns) / config.steps, "s")
        yield row("speed", median(jobs[name].tokens / t for t in record.turns), "tokens/s")
        if record.peak_memory is not None:
            yield row("peak memory", record.peak_memory, "bytes")


def contest(title: str, contestants: dict, config: BenchConfig, progress: Progress) -> dict[str, rounds.Record]:
    return rounds.contest(title, contestants, config.seconds, config.threads, PRELOAD, progress)


PRELOAD = ["tlm.benches.train", "transformers.trainer", "deepspeed"]
CASES = {  # what measures it; lines and columns of its table
    "mlm": (race, "engine", "metric"),
    "joint": (race, "engine", "metric"),
    "parts": (parts, "metric", "case"),
    "growth": (growth, "case", "metric"),
    "multitask": (race, "engine", "metric"),
}


# --- the command ----------------------------------------------------------------------------------------------------


def bench(config: BenchConfig) -> int:
    """Runs the cases and shows a table of each; what is measured so far is in `out` after each case."""
    check(config)
    config = replace(config, threads=config.threads or torch.get_num_threads())
    os.environ |= {"DS_ACCELERATOR": "cpu", "KINETO_LOG_LEVEL": "99"}  # read at import; the latter keeps profiles quiet
    progress, rows = Progress(), []
    data = prepare_data(config, progress)
    machine = environment() | {"threads": config.threads}
    machine["versions"] |= {name: version(name) for name in RIVALS_NEED}
    for case in config.cases:
        measure, lines, columns = CASES[case]
        new = list(measure(case, config, data, progress))
        rows += new
        if config.out:
            write_json(Path(config.out), {"machine": machine, "rows": rows})
        rounds.show(new, lines, columns)
    return 0


RIVALS_NEED = ("transformers", "accelerate")


def check(config: BenchConfig) -> None:
    """Raises InputError for what cannot be measured, before anything is read."""
    if unknown := next((case for case in config.cases if case not in CASES), None):
        near = difflib.get_close_matches(unknown, CASES, 1)
        hint = f"did you mean {near[0]}?" if near else f"use some of {', '.join(CASES)}"
        raise InputError(f"cases=[{unknown}]: no such case; {hint}")
    if not config.cases or not config.hidden:
        raise InputError("cases=[] or hidden=[]: nothing to measure; leave the key out for its default")
    if any(hidden < 1 or hidden % HEAD_DIM for hidden in config.hidden):
        raise InputError(f"hidden={config.hidden}: must be multiples of {HEAD_DIM}, the width of an attention head")
    if config.steps % CYCLE:
        raise InputError(
            f"steps={config.steps}: must be a multiple of {CYCLE}, as a task batch comes after every {CYCLE - 1} others"
        )
    if {"multitask"} != set(config.cases) and not config.task:
        raise InputError("task=: missing; `tlm bench train task=...` needs it (see `tlm bench train --help`)")
    if "multitask" in config.cases and not config.pool:
        raise InputError("pool=: missing; cases=[multitask] trains on prompted tasks, as in pool=FOLDER")
    missing = [name for name in RIVALS_NEED if importlib.util.find_spec(name) is None]
    if missing and {"mlm", "joint", "multitask"} & set(config.cases):
        raise InputError(
            f"{missing[0]}: not installed, and cases mlm, joint and multitask measure its Trainer; "
            f"pip install -c constraints.txt {' '.join(missing)}, or set cases=[parts,growth]"
        )


def prepare_data(config: BenchConfig, progress: Progress) -> Data:
    """The texts and vocabulary that `tlm train` would use; without a corpus the task's texts serve as general text."""
    pool = None
    if "multitask" in config.cases:
        opened = open_pool(config.pool)
        pool = multitask.prepare(pretrain_config(config), opened, opened.select(["train"]), Ledger(), progress)
        if set(config.cases) == {"multitask"}:
            return Data(None, None, 0, pool)
    train = TrainConfig(
        task=config.task, corpus=config.corpus, cache=config.cache, seed=config.seed, threads=config.threads,
        tokenizer=TokenizerConfig(config.vocabulary), model=ModelConfig(max_length=config.max_length),
        init=InitConfig("random"),
    )  # fmt: skip
    prepared = prepare(train, open_task(train.task, train.data), Ledger(), progress, engines.ALONE)
    task = prepared.source("train")
    return Data(prepared.external or Source(task.sequence, task.lengths), task, prepared.vocabulary, pool)


def version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
