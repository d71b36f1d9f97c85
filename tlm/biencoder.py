"""`tlm pretrain pool=P init_from=hf:FOLDER`: an encoder of `transformers` learns to tell the right choice from others.

A bi-encoder (Reimers and Gurevych 2019, arXiv 1908.10084): a prompt is encoded once, and so is each choice, both as the
mean of the encoder's last states. A choice scores scale * cos(prompt + W prompt, choice), and the loss is the
cross-entropy over an instance's choices. W starts at zero, so that the first scores are the checkpoint's own cosines
(`joint.steps=0` shows what these are worth). To encode each pair of prompt and choice would score them better and train
on 5 pairs a second, one thread: too slow to learn anything.

Examples, templates and held-out tasks are those of a generative run; tasks without choices are left out. There is one
process on a CPU, AdamW and no DeepSpeed, and no answer to loss spikes; but a run that was stopped goes on from its last
checkpoint and ends the same, to the bit.
"""

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from tasks.errors import InputError
from tasks.pool import Instance, Pool, PoolTask
from tasks.prompts import Prompted
from tlm.config import PretrainConfig, rows_of
from tlm.evaluate import batches_by_length
from tlm.hf import MULTIPLE, Counter, open_checkpoint, padded
from tlm.ledger import Ledger
from tlm.mixture import TASK, Mixture, order
from tlm.model import write_tensors
from tlm.multitask import SAMPLED, WINDOW, Taken, shown, take
from tlm.optimizers import schedule
from tlm.plan import steps_between_scores, texts_a_batch
from tlm.progress import Progress
from tlm.prompted import Number, chosen_prompt, rendered
from tlm.run import Run, read_json, write_json
from tlm.signals import Stopped, StopSignals

ARM = "bi-encoder"
SCALE = 20.0  # of cosines at the start, as in sentence-transformers
ENCODER_SHARE = 0.025  # the encoder's learning rate, as a share of joint.lr, which is the head's: 5e-5 by default
MOST_CHOICES = 32  # of an instance that train: the right one and others, drawn anew each time
TOKENS_AT_ONCE = 2048  # of texts of one length, padded to a multiple of MULTIPLE, about so many tokens together
LOG_EVERY = 10  # steps
UNHEEDED = (
    "corpus", "attention", "device", "precision", "compile", "activation_checkpointing", "micro_batch", "deepspeed",
    "pool.soft", "pool.long_answers", "joint.average", "joint.keep_at",
)  # fmt: skip


class BiEncoder(nn.Module):
    """Texts -> vectors, float32[texts, hidden]; prompts and choices -> scores."""

    def __init__(self, tokenizer, encoder: nn.Module, max_length: int):
        super().__init__()
        self.tokenizer, self.encoder = tokenizer, encoder
        self.max_length = min(max_length, tokenizer.model_max_length)
        hidden = encoder.config.hidden_size
        self.head = nn.Linear(hidden, hidden, bias=False)
        nn.init.zeros_(self.head.weight)
        self.log_scale = nn.Parameter(torch.tensor(math.log(SCALE)))
        self.flops = 0  # of all forward passes so far, padding included
        self.tokens = 0
        self.counter = Counter(encoder)

    def encode(self, texts: Sequence[str], side: str) -> list[list[int]]:
        """Tokens, those that ask [CLS] and [SEP] among them. What is too long loses its `side`."""
        self.tokenizer.truncation_side = side
        return self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]

    def embed(self, texts: Sequence[str], side: str = "right") -> torch.Tensor:
        """float32[texts, hidden]: the mean of each one's last states."""
        tokens, vectors = self.encode(texts, side), []
        lengths = when_padded([len(t) for t in tokens])
        alike = [np.flatnonzero(lengths == length) for length in np.unique(lengths)]  # so nothing is padded further
        parts = [same[part] for same in alike for part in batches_by_length(lengths[same], TOKENS_AT_ONCE)]
        for part in parts:
            batch = padded(self.tokenizer, [tokens[i] for i in part])
            states, mask = self.encoder(**batch).last_hidden_state, batch["attention_mask"]
            vectors.append((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
            self.tokens += int(mask.sum())
            self.flops += len(part) * self.counter.forward({name: value[:1] for name, value in batch.items()})
        return torch.cat(vectors)[np.argsort(np.concatenate(parts))]

    def forward(self, prompts: Sequence[str], choices: Sequence[Sequence[str]]) -> list[torch.Tensor]:
        """Of each prompt the scores of its choices, float32[choices]. What several prompts offer is encoded once."""
        numbers = {text: number for number, text in enumerate(dict.fromkeys(c for own in choices for c in own))}
        prompts_ND = self.embed(prompts, side="left")  # a template asks at its end
        prompts_ND = F.normalize(prompts_ND + self.head(prompts_ND), dim=-1)
        choices_CD = F.normalize(self.embed(list(numbers)), dim=-1)
        self.flops += 2 * len(prompts) * self.head.weight.numel()
        return [self.log_scale.exp() * (choices_CD[[numbers[text] for text in own]] @ vector)
                for vector, own in zip(prompts_ND, choices, strict=True)]  # fmt: skip

    def losses(self, prompted: Sequence[Prompted]) -> torch.Tensor:
        """Cross-entropies of the right choices, float32[n]."""
        found = self([p.text for p in prompted], [p.answers for p in prompted])
        return torch.stack([scores.logsumexp(0) - scores[p.gold] for scores, p in zip(found, prompted, strict=True)])


def pretrain_encoder(config: PretrainConfig, pool: Pool, tasks: list[PoolTask], progress: Progress) -> dict:
    """One run, from a pool and a checkpoint to `summary.json`; returns the summary. Raises InputError for a checkpoint
    that is no encoder, keys that it has no use for, and where no task has choices."""
    folder = config.init_from.removeprefix("hf:")
    refuse_unheeded(config)
    config.run = config.run or f"{Path(pool.path).name}-{config.pool.tasks or 'all'}-{Path(folder).name}-{config.seed}"
    run = Run(Path(config.out) / config.run, config)
    if run.summary_path.exists():
        progress.say(f"{run.folder} is finished; its summary follows")
        return read_json(run.summary_path)
    choosing = [task for task in tasks if task.format == "choice"]
    if not choosing:
        raise InputError(f"{pool.path}: no task of {', '.join(config.pool.categories)} has choices to tell apart")
    torch.set_num_threads(config.threads or torch.get_num_threads())
    model = BiEncoder(*open_encoder(folder, config.model.dropout), config.model.max_length or WINDOW)
    ledger = Ledger()
    taken = take(config, pool, choosing, ledger, progress)
    config = with_steps(config, taken, model)
    run.begin([taken.source])
    best = Training(config, run, taken, model, ledger, progress).steps()

    parameters = sum(p.numel() for p in model.parameters())
    embeddings = model.encoder.get_input_embeddings().weight.numel()
    sizes = {"parameters": parameters, "parameters_without_embeddings": parameters - embeddings}
    summary = {
        "name": run.folder.name,
        "task": Path(pool.path).name,
        "metric": "accuracy",
        "labels": [],
        "arm": ARM,
        "seed": config.seed,
        "dev": best,
        "test": None,
        "model": sizes | {"max_length": model.max_length},
        "data": taken.counts | {"left_out_without_choices": len(tasks) - len(choosing), "external_documents": 0,
                                "external_tokens": 0},
        "selection": None,
        "cost": ledger.cost(parameters, config.price_per_hour),
        "init_from": {"folder": folder, "cost": None},  # what it has cost is not known
        "config_sha256": run.config_sha256,
    }  # fmt: skip
    save(model, run.folder / "model")
    write_json(run.folder / "model" / "pool.json", shown(replace(config, init_from=None), taken.tasks))
    write_json(run.summary_path, summary)
    return summary


def refuse_unheeded(config: PretrainConfig) -> None:
    given, default = ({name: value for name, _, value, _ in rows_of(c)} for c in (config, PretrainConfig()))
    for name in UNHEEDED:
        if given[name] != default[name]:
            raise InputError(f"{name}={given[name]}: a checkpoint of transformers trains without it; leave it out")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"init_from={config.init_from}: a checkpoint of transformers trains in one process; start one")


def open_encoder(folder: str, dropout: float):
    """(Tokenizer, encoder). Raises InputError for a decoder, whose first state knows nothing of what follows."""
    tokenizer, encoder = open_checkpoint(folder, dropout)
    encoder.eval()
    one, other = torch.tensor([[1, 2, 3], [1, 2, 4]])
    if not encoder.config.is_encoder_decoder:
        with torch.no_grad():
            one, other = encoder(input_ids=torch.stack([one, other])).last_hidden_state[:, 0]
        if not torch.equal(one, other):
            return tokenizer, encoder
    raise InputError(f"init_from=hf:{folder}: is no encoder; give a checkpoint of one, such as BERT's")


def with_steps(config: PretrainConfig, taken: Taken, model: BiEncoder) -> PretrainConfig:
    """With the number of instances a step, and the steps that `budget` pays for, by the lengths of a sample."""
    trial = taken.mixture(Mixture(2 * config.seed, {}, {}, 0), config.pool)
    positions = np.arange(SAMPLED)
    sample = [example(taken, config.seed, *pair) for pair in zip(trial.examples_at(TASK, positions), positions,
                                                                 strict=True)]  # fmt: skip
    prompts = np.array([len(tokens) for tokens in model.encode([p.text for p in sample], "left")])
    batch = texts_a_batch(config.joint, TASK, prompts.mean())
    joint = replace(config.joint, batch=batch)
    if config.budget:
        choices = model.encode([c for p in sample for c in p.answers], "right")  # in a batch some of them are alike
        lengths = when_padded([*prompts, *map(len, choices)])
        with torch.no_grad():
            of_length = {n: flops_of(model, int(n)) for n in np.unique(lengths)}
        of_all = sum(of_length[n] for n in lengths)
        steps = round(config.budget / (3 * batch * joint.accumulation * of_all / len(sample)))
        if not steps:
            raise InputError(f"budget={config.budget:g}: too small for a step; raise it")
        joint = replace(joint, steps=steps, eval_every=steps_between_scores(steps, last=True))
    return replace(config, joint=joint)


def when_padded(lengths: Sequence[int]) -> np.ndarray:
    """What `padded` makes of texts of these lengths that stand alone, int64[texts]."""
    return -(-np.array(lengths) // MULTIPLE) * MULTIPLE


def flops_of(model: BiEncoder, length: int) -> int:
    tokens = torch.full((1, min(length, model.max_length)), 1)
    return model.counter.forward({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})


def example(taken: Taken, seed: int, number: int, position: int) -> Prompted:
    """What stands at `position` of the mixture's stream, with at most MOST_CHOICES choices."""
    row, template, _ = Number.of(number)
    instance = taken.instances[row]
    return fewer(rendered(instance, taken.prompts[instance.task][template]), seed, int(position))


def fewer(prompted: Prompted, seed: int, position: int) -> Prompted:
    if len(prompted.answers) <= MOST_CHOICES:
        return prompted
    others = np.delete(np.arange(len(prompted.answers)), prompted.gold)
    drawn = others[order(seed, f"choices of {position}", 0, len(others))[: MOST_CHOICES - 1]]
    return Prompted(prompted.text, tuple(prompted.answers[i] for i in (prompted.gold, *drawn)), 0)


@dataclass
class Training:
    """The loop. Its checkpoint is one file: weights, AdamW's moments, and where the run stands."""

    config: PretrainConfig
    run: Run
    taken: Taken
    model: BiEncoder
    ledger: Ledger
    progress: Progress

    def steps(self) -> dict | None:
        """Returns the last scores on dev, or None where none were asked for."""
        config, stage, model, ledger = self.config, self.config.joint, self.model, self.ledger
        plain = Mixture(2 * config.seed, {TASK: SAMPLED}, {TASK: stage.batch}, 0, stage.accumulation,
                        round(stage.batch_ramp * stage.steps))  # fmt: skip
        mixture = self.taken.mixture(plain, config.pool)
        self.optimizer = torch.optim.AdamW(groups(model, stage.weight_decay), lr=0.0)
        dev = self.dev() if stage.eval_every else []
        step, scores, recent = self.restore()
        saved, signals = time.perf_counter(), StopSignals()
        with self.progress.phase("joint", stage.steps), signals:
            while step < stage.steps:
                with ledger.phase("joint"):
                    rate = stage.lr * schedule(stage.schedule, step, stage.steps, stage.warmup)
                    loss, norm = self.step(mixture, step, rate)
                step += 1
                if not math.isfinite(loss + norm):
                    raise InputError(f"{self.run.folder}: the loss is no number at step {step}; lower joint.lr")
                recent.append(loss)
                if step % LOG_EVERY == 0 or step == stage.steps:
                    loss = float(np.mean(recent))
                    self.record(step, kind="train", loss=loss, task_loss=loss, grad_norm=norm, lr=rate)
                    self.progress.update(step, stage.steps, f"task {loss:.3f}")
                    recent = []
                if stage.eval_every and (step % stage.eval_every == 0 or step == stage.steps):
                    scores = self.score(dev) | {"step": step}
                    self.record(**scores, kind="dev")
                if signals.number or time.perf_counter() - saved > config.checkpoint_seconds:
                    self.checkpoint(step, scores, recent)
                    saved = time.perf_counter()
                if signals.number:
                    raise Stopped(signals.number)
        return scores or (self.score(dev) | {"step": step} if dev else None)

    def step(self, mixture: Mixture, step: int, rate: float) -> tuple[float, float]:
        """Mean loss of an instance, and the gradient's norm."""
        model, stage, total = self.model.train(), self.config.joint, 0.0
        torch.manual_seed(mixture.seed * 2**32 + step)  # of dropout
        tokens, flops = model.tokens, model.flops
        for micro in mixture.draw(step):
            pairs = zip(micro.examples, micro.positions, strict=True)
            loss = model.losses([example(self.taken, self.config.seed, *pair) for pair in pairs]).mean()
            (loss / stage.accumulation).backward()
            total += loss.item() / stage.accumulation
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), stage.clip).item()
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ledger.tokens += model.tokens - tokens
        self.ledger.joint_tokens = self.ledger.tokens
        self.ledger.flops += 3 * (model.flops - flops)
        return total, norm

    def dev(self) -> list[Prompted]:
        taken = self.taken
        found = map(taken.instances.__getitem__, taken.dev_rows(self.config.joint.dev))
        return [rendered(instance, taken.prompts[instance.task][0]) for instance in found]

    @torch.no_grad()
    def score(self, prompted: Sequence[Prompted]) -> dict[str, float]:
        """Mean cross-entropy and accuracy of choices."""
        with self.ledger.phase("evaluation"):
            found = scores_of(self.model.eval(), prompted)
        log_p = [torch.from_numpy(scores).log_softmax(0)[p.gold].item() for scores, p in zip(found, prompted,
                                                                                             strict=True)]  # fmt: skip
        right = [scores.argmax() == p.gold for scores, p in zip(found, prompted, strict=True)]
        return {"loss": -float(np.mean(log_p)), "accuracy": float(np.mean(right))}

    def record(self, step: int, **values) -> None:
        ledger = self.ledger
        spent = {"tokens": ledger.tokens, "flops": int(ledger.flops), "seconds": round(sum(ledger.seconds.values()), 3)}
        self.run.record(stage="joint", step=step, **values, **(spent if values["kind"] == "train" else {}))

    def checkpoint(self, step: int, scores: dict | None, recent: list[float]) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, weight in self.model.named_parameters():
            moments = self.optimizer.state.get(weight, {})
            tensors |= {f"optimizer.{key}.{name}": tensor for key, tensor in moments.items()}
        state = {
            "step": step,
            "scores": scores,
            "recent": recent,
            "ledger": self.ledger.state(),
            "bytes": self.run.metrics_bytes(),
        }
        self.run.checkpoints.mkdir(exist_ok=True)
        write_tensors(self.run.checkpoints / "last.safetensors", tensors, {"state": json.dumps(state)})

    def restore(self) -> tuple[int, dict | None, list[float]]:
        """Steps done, the last scores on dev, and losses that are not yet recorded."""
        path = self.run.checkpoints / "last.safetensors"
        if not path.exists():
            self.run.cut_metrics(0)
            return 0, None, []
        try:
            with safe_open(path, "pt") as file:
                state = json.loads(file.metadata()["state"])
            tensors = load_file(path)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{path}: damaged ({error}); delete it to begin anew") from None
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        for name, weight in self.model.named_parameters():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{key}.{name}" in tensors]
            if keys:
                self.optimizer.state[weight] = {key: tensors[f"optimizer.{key}.{name}"] for key in keys}
        for name, value in state["ledger"].items():
            setattr(self.ledger, name, value)
        self.run.cut_metrics(state["bytes"])
        self.progress.say(f"going on from step {state['step']} of {self.run.folder}")
        return state["step"], state["scores"], state["recent"]


def groups(model: BiEncoder, weight_decay: float) -> list[dict]:
    """AdamW's, by learning rate (a share of joint.lr) and decay: matrices have it, biases, norms and the scale none."""
    of_head = {id(model.head.weight), id(model.log_scale)}
    return [
        {
            "params": [p for p in model.parameters() if (id(p) in of_head) == head and (p.ndim > 1) == matrices],
            "share": 1.0 if head else ENCODER_SHARE,
            "weight_decay": weight_decay if matrices else 0.0,
        }
        for head in (False, True)
        for matrices in (False, True)
    ]


@torch.no_grad()
def scores_of(model: BiEncoder, prompted: Sequence[Prompted]) -> list[np.ndarray]:
    """Of each prompt the scores of its choices, float64[choices]."""
    if not prompted:
        return []
    return [scores.double().numpy() for scores in model([p.text for p in prompted], [p.answers for p in prompted])]


def save(model: BiEncoder, folder: Path) -> None:
    """encoder/, which transformers opens, and, last, head.safetensors."""
    model.encoder.save_pretrained(folder / "encoder")
    model.tokenizer.truncation_side = "right"
    model.tokenizer.save_pretrained(folder / "encoder")
    head = {"head.weight": model.head.weight.data, "log_scale": model.log_scale.data}
    write_tensors(folder / "head.safetensors", head, {"max_length": str(model.max_length)})


@dataclass(frozen=True)
class EncoderRun:
    """A finished run of this module, with the methods of zeroshot.Run that scoring choices needs."""

    folder: Path
    model: BiEncoder
    seen: dict[str, str]
    choices: str
    templates: int | None
    ledger: Ledger = field(default_factory=Ledger)

    def prompted(self, instance: Instance, task: PoolTask) -> Prompted:
        return rendered(instance, chosen_prompt(instance, task, self.choices, self.templates))

    def choice_scores(
        self, prompted: Sequence[Prompted], tasks: Sequence[str], rules: Sequence[str] = ("head",)
    ) -> list[dict[str, np.ndarray]]:
        """By the one rule that there is, whatever `rules` asks for."""
        model, ledger = self.model, self.ledger
        tokens, flops = model.tokens, model.flops
        found = [{"head": scores} for scores in scores_of(model, prompted)]
        ledger.tokens += model.tokens - tokens
        ledger.flops += model.flops - flops
        return found


def open_encoder_run(folder: Path, shown: dict) -> EncoderRun:
    path = folder / "model" / "head.safetensors"
    try:
        with safe_open(path, "pt") as file:
            max_length = int(file.metadata()["max_length"])
        head = load_file(path)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path}: truncated or damaged ({error}); restore it or train again") from None
    model = BiEncoder(*open_checkpoint(str(folder / "model" / "encoder"), 0.0), max_length)
    model.load_state_dict(model.state_dict() | head)
    return EncoderRun(folder, model.eval(), shown["seen"], shown["choices"], shown["templates"])
