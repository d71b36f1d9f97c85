"""The loop, in two stages: joint (task and masked LM on the selection), then the task alone.

`train` reads top to bottom: prepare, joint stage, finetune stage, test once. Everything that decides the future is in a
checkpoint (weights, optimizer, step, ledger, best score so far) or a pure function of (seed, step): a run that was
killed and is started again ends with the same weights and losses, to the bit.
"""

import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks.errors import InputError
from tlm import engine as engines
from tlm import evaluate, lowbit, memory, plan, warmstart
from tlm.ahead import Ahead
from tlm.averaging import Average
from tlm.boards import Boards, check_boards, open_boards
from tlm.checkpoints import Checkpoints, latest
from tlm.config import StageConfig, TrainConfig, TrainerConfig
from tlm.doctor import peak_flops
from tlm.engine import World
from tlm.ledger import Ledger, Meter, add_costs, peak_rss_bytes
from tlm.lowbit import delayed
from tlm.mixture import EXTERNAL, TASK, MicroBatch, Mixture
from tlm.model import ModelShape, Transformer, compile_layers, forward_flops, load_model, save_model, training_flops
from tlm.objectives import Masking, Mixup, Objective, Weighted
from tlm.optimizers import muon_flops, schedule
from tlm.precision import autocasts, check_precision, products
from tlm.prepare import NO_TASK, Prepared, open_task, prepare
from tlm.progress import Progress
from tlm.run import Run, read_json, write_json, write_text
from tlm.signals import Stopped, StopSignals
from tlm.spikes import Spikes
from tlm.tokenizer import MASK, SPECIALS, save_tokenizer, tokenizer_hash

LOG_EVERY = 10  # steps
Drawn = tuple[list[MicroBatch], list[Weighted]]  # a step's examples over all processes, this one's share as batches


@dataclass
class Stage:
    """What one stage needs, and where it stands."""

    name: str
    config: StageConfig
    objective: Objective  # or another with its methods (see prompted.py)
    mixture: Mixture
    score: Callable[[Transformer, World], dict]  # on dev: `loss`, `metric` and what else there is
    metric: str
    step: int = 0
    most_tokens: int | None = None  # that a process computes at once: `micro_batch=`
    skipped: int = 0  # steps' worth of batches left out after loss spikes
    spikes: Spikes = field(default_factory=Spikes)
    best: dict = field(default_factory=dict)  # dev scores of the best weights so far
    scores_since_best: int = 0

    def __post_init__(self):
        self.average = Average(self.config)

    @property
    def keeps_best(self) -> bool:
        """The stage whose best weights are the run's result."""
        return self.name == "finetune"


@engines.in_touch()
def train(config: TrainConfig, progress: Progress | None = None) -> dict:
    """One run, from files to `summary.json`; returns the summary. A finished run is not run again."""
    task = open_task(config.task, config.data)  # first, so that bad data is told at once
    if task is NO_TASK and not config.corpus:
        raise InputError("task=none: leaves nothing to learn without corpus=; give a corpus, or a task")
    world, run, progress = begin(config, progress)
    if world.size > len(task.splits["train"]) and task is not NO_TASK:
        raise InputError(
            f"{task.source}: {len(task.splits['train'])} training texts for {world.size} processes; start no more "
            "processes than texts"
        )
    if run.summary_path.exists():
        return read_json(run.summary_path)

    ledger, config = Ledger(), plan.fitted(config, task)
    prepared = prepare(config, task, ledger, progress, world)
    config, model, ledger, last = learn(config, run, prepared, stages, ledger, progress, world)
    if not last.keeps_best:
        return finish_pretraining(config, run, model, ledger, prepared, world)
    return finish(config, run, model, last, ledger, prepared, progress, world)


def begin(config: TrainerConfig, progress: Progress | None) -> tuple[World, Run, Progress]:
    """The processes and the run folder, after everything that can be refused before data is read."""
    check_boards(config.boards)
    engines.check(config)
    device = engines.device_of(config.device)
    check_precision(config.precision, device)
    lowbit.check(config, device)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    world = engines.launch(device, config.timeout_minutes)
    progress = progress if progress and world.rank == 0 else Progress(quiet=world.rank > 0)
    run = Run(Path(config.out) / config.run, config, writes=world.rank == 0)
    if run.summary_path.exists():
        progress.say(f"{run.folder} is finished; its summary follows")
    return world, run, progress


def learn(
    config: TrainerConfig, run: Run, prepared: Any, stages: Callable, ledger: Ledger, progress: Progress, world: World
) -> tuple[TrainerConfig, Transformer, Ledger, Stage]:
    """All stages, from the last checkpoint if there is one: the configuration with the budget's steps, the model, the
    ledger and the last stage. `stages(config, prepared, world)` makes them; `prepared` has what they need, and the
    model's shape and start, as Prepared does."""
    device = world.device
    autocast = autocasts(config.precision, device)
    meter = Meter(ledger, peak_flops(device, config.precision, torch.get_num_threads()))
    model = new_model(config, prepared, device)
    if model.conversion:
        progress.say(str(model.conversion))
    if config.budget:
        config = within_budget(config, prepared, stages, ledger.flops, world)
    joint, *finetune = stages(config, prepared, world)
    checkpoints = Checkpoints(run.checkpoints, world, config.keep_checkpoints, 60 * config.timeout_minutes)
    tag = latest(run.checkpoints)

    signals = StopSignals()
    for stage in (joint, *finetune):
        if tag and tag.startswith("finetune") and stage is joint:
            continue  # the checkpoint lies beyond it
        if stage is not joint:
            fresh_start(model, config)
        losses = stage.objective.losses(model).to(device)
        stage.most_tokens = run.micro_batches().get(stage.name) or memory.choose(
            config.micro_batch, losses, stage.objective, stage.mixture, config.optimizer, config.precision, world
        )
        engine = engines.initialize(losses, stage.config, config.optimizer, autocast, config.deepspeed)
        run.begin(prepared.inputs)
        run.keep_micro_batch(stage.name, stage.most_tokens)
        meter.begin(stage.name)
        loop = Loop(config, run, prepared, world, progress, checkpoints, stage, model, engine, meter)
        if tag and tag.startswith(stage.name):
            loop.resume(tag)
        else:
            loop.checkpoint()
        boards = open_boards(config.boards if run.writes else (), run.folder, stage.name, config, stage.step)
        with progress.phase(stage.name, stage.config.steps), signals, Ahead(loop.batches) as batches, closing(boards):
            try:
                with products("fp32" if autocast else config.precision, device, model.shape.hidden):
                    loop.steps(batches, boards, signals)
            except torch.OutOfMemoryError:
                raise InputError(
                    f"{run.folder}: the GPU's memory is full; set micro_batch=auto, or to fewer tokens than "
                    f"{stage.most_tokens or 'a micro-batch has'}, and the run goes on from its last checkpoint"
                ) from None
        checkpoints.wait()
        if odd := lowbit.take_odd(model):
            progress.say(f"{stage.name}: " + ", ".join(f"{number:,} {what}" for what, number in sorted(odd.items())))
        stage.average.apply(model)
        model = engines.whole(model)
        engine.destroy()
        if stage is joint and prepared.held_out:
            masking = Masking(0.15, prepared.vocabulary, len(SPECIALS), MASK, seed=0)  # alike for all runs
            with meter.ledger.phase("evaluation"):
                loss = evaluate.mlm_loss(model, prepared.held_out, masking)
            run.record(stage=stage.name, step=stage.step, kind="held_out", mlm_loss=loss)
    return config, model, meter.ledger, stage


def stages(config: TrainConfig, prepared: Prepared, world: World) -> tuple[Stage, ...]:
    """Both stages at their first step; without a task the first alone."""
    task, external = prepared.source("train"), prepared.external
    seed, rho1 = 2 * config.seed, config.joint.external_per_task if external else 0
    rates = config.joint.mask_rate, config.joint.task_mask_rate
    masking = Masking(rates[0], prepared.vocabulary, len(SPECIALS), MASK, seed, task_rate=rates[1])

    def score(model: Transformer, world: World) -> dict:
        dev = prepared.source("dev")
        return evaluate.scores(evaluate.probabilities(model, dev, world), dev.labels)

    def stage(name: str, settings: StageConfig, objective: Objective, seed: int, rho1: int) -> Stage:
        batches = mixture(name, settings, objective, seed, rho1, world)
        return Stage(name, settings, objective, batches, score, prepared.task.metric)

    if prepared.task is NO_TASK:
        settings = replace(config.joint, eval_every=0)
        alone = Objective({EXTERNAL: external}, config.joint.mlm_weight, masking)
        return (stage("joint", settings, alone, seed, rho1),)
    sources = {TASK: task} | ({EXTERNAL: external} if external else {})
    masked = masking if config.joint.mask_rate else None
    mixup = Mixup(config.joint.mixup, seed) if config.joint.mixup else None
    joint = Objective(sources, config.joint.mlm_weight, masked, None, offsets(config.joint, prepared), mixup)
    hiding = replace(masking, task_rate=config.finetune.mask_rate, seed=seed + 1) if config.finetune.mask_rate else None
    mixup = Mixup(config.finetune.mixup, seed + 1) if config.finetune.mixup else None
    finetune = Objective({TASK: task}, 0.0, None, hiding, offsets(config.finetune, prepared), mixup)
    return (
        stage("joint", config.joint, joint, seed, rho1),
        stage("finetune", config.finetune, finetune, seed + 1, 0),
    )


def offsets(stage: StageConfig, prepared: Prepared) -> torch.Tensor | None:
    """Logit adjustment (Menon et al. 2021, arXiv 2007.07314): what is added to the logits in training, float32[labels],
    `balance` times the log shares of the labels; None if nothing is. Without it the model answers as if all were alike.
    """
    if not stage.balance:
        return None
    counts = np.bincount(prepared.source("train").labels, minlength=len(prepared.task.labels)) + 1.0
    return stage.balance * torch.from_numpy(np.log(counts / counts.sum())).float()


def within_budget(config: TrainerConfig, prepared: Any, stages: Callable, spent: float, world: World) -> TrainerConfig:
    """With the steps that `budget` pays for, `spent` FLOPs being gone already."""
    shape = replace(prepared.shape(config.model), **lowbit.in_shape(config))
    both = stages(config, prepared, world)
    per_step = {stage.name: step_flops(stage, shape, config.optimizer) for stage in both}
    last = both[-1].mixture
    a_pass = last.sizes[TASK] / last.batch[TASK] if TASK in last.sizes else 0.0
    return plan.with_steps(config, spent, per_step, a_pass)


def step_flops(stage: Stage, shape: ModelShape, optimizer: str) -> float:
    """Of a step of the mean length; a ramp's mean batch is 5/8 of the full one."""
    mixture, flops = stage.mixture, 0.0
    for name, source in stage.objective.sources.items():
        of_all = stage.objective.flops(name, shape)
        share = (1 if name == TASK else mixture.external_per_task) / mixture.cycle if TASK in mixture.sizes else 1
        flops += share * mixture.batch[name] * of_all / len(source)
    full_steps = stage.config.accumulation * (1 - 3 / 8 * stage.config.batch_ramp)
    by_muon = optimizer == "muon" and not shape.rank  # adapters are left to AdamW
    own = muon_flops(shape.hidden, shape.intermediate, shape.layers) if by_muon else 0
    return full_steps * flops + own


def mixture(name: str, stage: StageConfig, objective: Objective, seed: int, rho1: int, world: World) -> Mixture:
    """Micro-batches of `stage.batch` texts, or of as many as hold about `stage.batch_tokens` tokens."""
    sizes = {source: len(examples) for source, examples in objective.sources.items()}
    batch = {
        source: plan.texts_a_batch(stage, source, examples.lengths.mean())
        for source, examples in objective.sources.items()
    }
    mixture = Mixture(seed, sizes, batch, rho1, stage.accumulation, round(stage.batch_ramp * stage.steps))
    together = objective.together
    if mixture.smallest <= together * (world.size - 1):
        what, more = ("one", "") if together == 1 else ("a pair", f" (or {name}.mixup=0)")
        raise InputError(
            f"{name}.batch: a micro-batch of {mixture.smallest} texts is less than {what} for each of the {world.size} "
            f"processes; set {name}.batch={(4 if mixture.ramp_steps else 1) * together * world.size} or more{more}"
        )
    return mixture


def new_model(config: TrainerConfig, prepared: Any, device: torch.device) -> Transformer:
    """The model from scratch: a pure function of the seed, and of the corpus's counts if `init=cooccurrence`; or the
    one of `init_from` with a fresh head, and maybe frozen but for adapters."""
    settings, generator = lowbit.in_shape(config), torch.Generator().manual_seed(config.seed)
    shape = prepared.shape(config.model)
    model = Transformer(shape if settings["rank"] else replace(shape, **settings), generator)
    if config.init_from:
        take_over(model, config.init_from)
    if settings["rank"]:
        lowbit.adapt(model, config.precision, config.rank, generator)
    if prepared.start is not None:
        warmstart.predict_from_context(model, prepared.start)
    set_dropout(model, config.model.dropout)
    model.model.checkpointing = config.activation_checkpointing
    if config.compile:
        compile_layers(model, device)
    return model


def take_over(model: Transformer, folder: str) -> None:
    """The weights in `folder`, adapters merged, but for the classification head and the prompts of its tasks. Raises
    InputError if they are of another shape."""
    cost_of(folder)
    old = load_model(Path(folder))
    lowbit.merge(old)
    free = {name: getattr(model.shape, name) for name in ("num_labels", "max_length", "recipe", "attention", "soft")}
    if replace(old.shape, **free) != model.shape:
        raise InputError(f"init_from={folder}: is of another shape ({old.shape}); set model.* and tokenizer.* alike")
    own = ("head.", "classifier.", "model.embeddings.soft.")
    weights = {name: w for name, w in old.state_dict().items() if not name.startswith(own)}
    model.load_state_dict(model.state_dict() | weights)


def fresh_start(model: Transformer, config: TrainConfig) -> None:
    """What changes between the stages: the head (the paper starts it anew) and dropout."""
    if config.finetune.head == "fresh":
        model.reset_head(model.shape.num_labels, torch.Generator().manual_seed(config.seed + 1))
    set_dropout(model, config.finetune_dropout)


def set_dropout(model: Transformer, rate: float) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = rate


@dataclass
class Loop:
    """A stage under way."""

    config: TrainConfig
    run: Run
    prepared: Any
    world: World
    progress: Progress
    checkpoints: Checkpoints
    stage: Stage
    model: Transformer
    engine: Any
    meter: Meter

    def steps(self, batches: Callable[[int], Drawn], boards: Boards, signals: StopSignals) -> None:
        """From `stage.step` to the end of the stage, or until dev scores stop rising."""
        stage, settings, meter = self.stage, self.stage.config, self.meter
        saved = time.perf_counter()
        self.model.train()
        if stage.step == 0 and stage.keeps_best and scores_first(self.config):
            with meter.paused("evaluation"):
                self.score_dev(boards)  # where labels are few, the joint stage's weights may be the best
        while stage.step < settings.steps and not exhausted(stage):
            rate = schedule(settings.schedule, stage.step, settings.steps, settings.warmup)
            engines.set_rates(self.engine, settings, rate)
            torch.manual_seed((stage.mixture.seed * 2**40 + stage.step * 2**10 + self.world.rank) % 2**63)  # dropout
            draw, micros = batches(stage.step + stage.skipped)
            loss, norm, amounts = self.gradients(micros)
            due = self.world.rank == 0 and time.perf_counter() - saved > self.config.checkpoint_seconds
            loss, asked, due = self.world.sum([loss, signals.number, due])
            kind, texts = "+".join(micro.source for micro in draw), min(len(micro.examples) for micro in draw)
            if trouble := stage.spikes.judge(kind, loss, norm, texts):
                meter.add(**{name: amounts[name] for name in ("tokens", "external_tokens", "flops")})
                if self.answer(boards, trouble, draw, loss, norm) == "rewind":
                    continue
            else:
                self.engine.step()
                meter.add(**amounts)
            stage.step += 1
            delayed.end_step(self.model, self.world.max)
            stage.average.update(self.model)

            last = stage.step == settings.steps
            kept = stage.step in getattr(settings, "keep_at", ())
            scored = settings.eval_every and (stage.step % settings.eval_every == 0 or last)
            if scored and not (last and self.scored_next):
                with meter.paused("evaluation"), stage.average.swapped(self.model):
                    self.score_dev(boards)
            if stage.step % LOG_EVERY == 0 or last or kept or exhausted(stage):
                self.log(boards, rate, norm)
            if kept:
                with meter.paused("checkpoints"), stage.average.swapped(self.model):
                    self.keep_model()
            if asked or (due and not stage.spikes.in_row):
                with meter.paused("checkpoints"):
                    self.checkpoint()
                saved = time.perf_counter()
            if asked:
                self.checkpoints.wait()
                raise Stopped(signals.number or signal.SIGTERM)

    @property
    def scored_next(self) -> bool:
        """Whether the next stage begins with a score of this one's last weights."""
        return not self.stage.keeps_best and scores_first(self.config)

    def batches(self, index: int) -> Drawn:
        draw = self.stage.mixture.draw(index)
        parts = self.stage.objective.step(draw, self.world.rank, self.world.size, self.stage.most_tokens)
        return draw, [replace(part, batch=part.batch.to(self.world.device)) for part in parts]

    def gradients(self, micros: list[Weighted]) -> tuple[float, float, dict[str, float]]:
        """Forward and backward of a step's micro-batches: this process's part of the loss, the norm of the whole
        gradient, and what the meter is to add."""
        amounts = dict.fromkeys(Meter.COUNTED, 0.0)
        for micro in micros:
            self.engine.set_gradient_accumulation_boundary(micro is micros[-1])
            mlm_sum, task_sum = self.engine(micro.batch, micro.mlm > 0, micro.task > 0)
            loss = sum(w * s for w, s in ((micro.mlm, mlm_sum), (micro.task, task_sum)) if s is not None)
            # DeepSpeed averages over processes; our weights sum
            self.engine.backward(loss * self.world.size, scale_wrt_gas=False)
            for name, amount in counts(micro, loss, mlm_sum, task_sum, self.model).items():
                amounts[name] += amount
        amounts["flops"] += self.optimizer_flops
        amounts["steps"] = 1 / self.world.size
        return amounts["loss"], engines.gradient_norm(self.engine), amounts

    def answer(self, boards: Boards, trouble: str, draw: list[MicroBatch], loss: float, norm: float) -> str:
        """Do what `spike=` says about a bad step, with a line in metrics.jsonl; returns what was done."""
        stage, spikes = self.stage, self.stage.spikes
        action = spikes.action(self.config.spike, math.isfinite(loss + norm))
        batches = [{"source": micro.source, "examples": micro.examples.tolist()} for micro in draw]
        self.run.record(
            stage=stage.name, step=stage.step + 1, kind="spike", trouble=trouble, action=action,
            loss=finite(loss), grad_norm=finite(norm), batches=batches,
        )  # fmt: skip
        boards.write({"spike": 1.0, "spike_loss": finite(loss), "spike_grad_norm": finite(norm)}, stage.step + 1)
        self.progress.say(f"{stage.name} step {stage.step + 1}: {trouble}; {action}")
        if action == "stop":
            raise InputError(
                f"{self.run.folder}: {trouble} at {stage.name} step {stage.step + 1}; lower {stage.name}.lr or "
                f"{stage.name}.matrix_lr and choose another run=NAME"
            )
        if action == "log":
            self.engine.step()
            return action
        with engines.idle(self.engine):
            self.engine.step()
        if action == "rewind":
            state = self.checkpoints.load(self.engine, latest(self.run.checkpoints))
            stage.skipped += stage.step - state["step"] + 1
            stage.step = state["step"]
            spikes.losses = state["spikes"]["losses"]  # those of later steps are no measure of these
            stage.average.load(state["average"])
            delayed.load(self.model, state.get("largest"))
        return action

    def log(self, boards: Boards, rate: float, norm: float) -> None:
        stage = self.stage
        values = self.meter.read(self.world.sum) | {"lr": rate * stage.config.lr, "grad_norm": finite(norm)}
        self.run.record(stage=stage.name, step=stage.step, kind="train", **values)
        boards.write(values, stage.step)
        self.progress.update(stage.step, stage.config.steps, describe(values, stage))

    def score_dev(self, boards: Boards) -> None:
        """Score dev; in the finetune stage keep the best weights (the earliest of equals) in ckpt/best."""
        stage, metric = self.stage, self.stage.metric
        model = engines.whole(self.model)
        scores = stage.score(model, self.world)
        self.run.record(stage=stage.name, step=stage.step, kind="dev", **scores)
        boards.write({f"dev_{name}": value for name, value in scores.items()}, stage.step)
        stage.scores_since_best += 1
        if not stage.best or (scores[metric], -scores["loss"]) > (stage.best[metric], -stage.best["loss"]):
            stage.best, stage.scores_since_best = scores | {"step": stage.step}, 0
            if stage.keeps_best and self.world.rank == 0:
                save_model(model, self.run.checkpoints / "best")

    def keep_model(self) -> None:
        model = engines.whole(self.model)
        if self.world.rank == 0:
            folder = self.run.folder / f"at-{self.stage.step:06d}"
            write_model(folder, model, self.prepared, self.config, self.meter.ledger)

    def checkpoint(self) -> None:
        stage = self.stage
        stage.spikes.rewinds = 0
        state = {
            "step": stage.step,
            "skipped": stage.skipped,
            "spikes": stage.spikes.state(),
            "best": stage.best,
            "scores_since_best": stage.scores_since_best,
            "average": stage.average.state(),
            "largest": delayed.state(self.model),
            "meter": self.meter.state(self.world.sum),
            "metrics_bytes": self.run.metrics_bytes(),
        }
        self.checkpoints.save(self.engine, f"{stage.name}-{stage.step:06d}", state)

    def resume(self, tag: str) -> None:
        stage, state = self.stage, self.checkpoints.load(self.engine, tag)
        stage.step, stage.skipped, stage.spikes = state["step"], state["skipped"], Spikes(**state["spikes"])
        stage.best, stage.scores_since_best = state["best"], state["scores_since_best"]
        stage.average.load(state["average"])
        delayed.load(self.model, state.get("largest"))
        self.meter.restore(state["meter"], first=self.world.rank == 0)
        self.run.cut_metrics(state["metrics_bytes"])
        self.progress.say(f"going on from checkpoint {tag} of {self.run.folder}")

    @property
    def optimizer_flops(self) -> float:
        """Of a step, beside the model's: Muon's products, which ZeRO shares out among the processes."""
        shape, by_muon = self.model.shape, any(group["muon"] for group in self.engine.optimizer.param_groups)
        share = 1 / self.world.size if self.engine.zero_optimization() else 1
        return share * muon_flops(shape.hidden, shape.intermediate, shape.layers) if by_muon else 0


def finite(value: float) -> float | None:
    """JSON has no word for what is not a number."""
    return value if math.isfinite(value) else None


def scores_first(config: TrainConfig) -> bool:
    """Whether the finetune stage scores the weights that it starts from."""
    finetune = getattr(config, "finetune", None)
    return bool(finetune and finetune.head == "keep" and finetune.eval_every and finetune.steps)


def exhausted(stage: Stage) -> bool:
    """Early stopping, in the stage whose best weights are kept."""
    return stage.keeps_best and 0 < stage.config.patience <= stage.scores_since_best


def counts(micro: Weighted, loss, mlm_sum, task_sum, model: Transformer) -> dict[str, float]:
    """What a micro-batch adds to the meter. FLOPs: of forward and backward, and of what is computed again for it."""
    batch = micro.batch
    tokens = sum(batch.lengths)
    masked, classified = len(batch.masked), len(batch) if task_sum is not None and batch.labels is not None else 0
    attended = batch.under(model.shape.attention).attended
    again = forward_flops(model.shape, batch.lengths, attended=attended) if model.model.checkpointing else 0
    texts = 0 if task_sum is None else classified or masked  # prompted tasks: answers' tokens
    return {
        "loss": loss.item(),
        "tokens": tokens,
        "external_tokens": tokens if micro.source == EXTERNAL else 0,
        "flops": training_flops(model.shape, batch.lengths, masked, classified, attended) + again,
        "mlm": mlm_sum.item() if mlm_sum is not None else 0.0,
        "masked": masked if mlm_sum is not None else 0,
        "task": task_sum.item() if texts else 0.0,
        "texts": texts,
    }


def finish(config, run, model, finetune, ledger, prepared, progress, world) -> dict:
    """Test once, by the best dev weights, if asked to; then write predictions, the model and, last, the summary."""
    task = prepared.task
    if finetune.best:
        model = load_model(run.checkpoints / "best").to(world.device)
    with progress.phase("test" if config.test else "last scores"), ledger.phase("test"):
        probabilities = evaluate.probabilities(model, prepared.source("test"), world) if config.test else None
        if not finetune.best:  # no stage two, or no dev scores in it: the last weights count
            dev = prepared.source("dev")
            finetune.best = evaluate.scores(evaluate.probabilities(model, dev, world), dev.labels) | {
                "step": finetune.step
            }
    test = evaluate.test_scores(task, probabilities) if config.test else None
    summary = summarize(config, run, model, ledger, prepared, dev=finetune.best, test=test)
    if world.rank == 0:
        if config.test:
            write_text(run.folder / "predictions.jsonl", evaluate.prediction_lines(task, probabilities))
        write_model(run.folder / "model", model, prepared, config, ledger, task.labels)
        write_json(run.summary_path, summary)
    return summary


def finish_pretraining(config, run, model, ledger, prepared, world) -> dict:
    """There is nothing to score: the model, and what it has cost, for those that start from it."""
    summary = summarize(config, run, model, ledger, prepared, dev=None, test=None)
    if world.rank == 0:
        write_model(run.folder / "model", model, prepared, config, ledger)
        write_json(run.summary_path, summary)
    return summary


def write_model(
    folder: Path,
    model: Transformer,
    prepared: Prepared,
    config: TrainConfig,
    ledger: Ledger,
    labels: Sequence[str] = (),
) -> None:
    """What `init_from` reads; cost.json, last: all that the weights have cost, back to a random start."""
    save_model(model, folder, labels)
    save_tokenizer(prepared.tokenizer, folder / "tokenizer.json")
    own = ledger.cost(lowbit.num_parameters(model), config.price_per_hour)
    before = [cost_of(config.init_from)] if config.init_from else []
    write_json(folder / "cost.json", add_costs([*before, own]))


def cost_of(folder: str) -> dict:
    return read_json(Path(folder) / "cost.json")


def summarize(config, run, model, ledger, prepared, dev, test) -> dict:
    """The summary of a run. `cost` is its own; what `init_from` has cost stands beside it."""
    task = prepared.task
    return {
        "name": run.folder.name,
        "task": task.name,
        "metric": task.metric,
        "labels": list(task.labels),
        "arm": prepared.arm,
        "seed": config.seed,
        "dev": dev,
        "test": test,
        "model": describe_model(model),
        "data": prepared.data | {"external_tokens_seen": ledger.external_tokens},
        "selection": {"folder": str(prepared.selection.folder), **prepared.selection.manifest}
        if prepared.selection
        else None,
        "cost": ledger.cost(lowbit.num_parameters(model), config.price_per_hour),
        "init_from": {"folder": config.init_from, "cost": cost_of(config.init_from)} if config.init_from else None,
        "config_sha256": run.config_sha256,
        "tokenizer_sha256": tokenizer_hash(prepared.tokenizer),
    }


def describe_model(model: Transformer) -> dict:
    parameters, trained = lowbit.num_parameters(model), sum(p.numel() for p in model.parameters() if p.requires_grad)
    embeddings = model.model.embeddings.tok_embeddings.weight.numel()
    shape = {name: getattr(model.shape, name) for name in ("hidden", "layers", "heads", "intermediate", "max_length")}
    sizes = {"parameters": parameters, "parameters_without_embeddings": parameters - embeddings, **shape}
    sizes |= {"trained_parameters": trained} if model.shape.rank else {}
    return sizes | ({"lowbit": asdict(model.conversion)} if model.conversion else {})


def describe(values: dict, stage: Stage) -> str:
    """The line beside the progress bar."""
    parts = [
        f"{name} {values[key]:.3f}"
        for name, key in (("mlm", "mlm_loss"), ("task", "task_loss"))
        if values[key] is not None
    ]
    parts += [f"dev {stage.best[stage.metric]:.3f}"] if stage.best else []
    parts += [f"{values['tokens_per_second']:,.0f} tokens/s", f"MFU {values['mfu']:.0%}"]
    return " ".join([*parts, f"peak {peak_rss_bytes() / 2**30:.1f} GiB"])
