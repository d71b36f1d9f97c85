"""Finetuning a checkpoint of `transformers` that lies in a folder: the outside reference, by the recipe of stage two.

Texts, order of examples, steps, schedule, scores and the choice of weights are those of our own stage two. What differs
is what belongs to the checkpoint: its tokenizer, its model, and AdamW, with which it was made. It takes minutes, so it
keeps no checkpoints: a run that was stopped begins anew.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from tasks.errors import InputError
from tlm.config import BASES, TrainConfig
from tlm.evaluate import TOKENS_PER_BATCH, batches_by_length, prediction_lines, scores, test_scores
from tlm.ledger import Ledger
from tlm.mixture import TASK, Mixture
from tlm.optimizers import schedule
from tlm.plan import fitted
from tlm.prepare import arm_of, open_task
from tlm.progress import Progress
from tlm.run import Run, read_json, write_json, write_text

MULTIPLE = 8  # texts are padded to a multiple of this, so that few shapes are counted


def finetune(config: TrainConfig, progress: Progress) -> dict:
    """One run, from files to `summary.json`; returns the summary. Raises InputError if there is no such checkpoint."""
    if config.precision in BASES:
        raise InputError(f"precision={config.precision}: does not go with init_from=hf:FOLDER; leave it out")
    task, stage, ledger = open_task(config.task, config.data), config.finetune, Ledger()
    run = Run(Path(config.out) / config.run, config)
    if run.summary_path.exists():
        progress.say(f"{run.folder} is finished; its summary follows")
        return read_json(run.summary_path)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    torch.manual_seed(config.seed)
    tokenizer, model = open_checkpoint(
        config.init_from.removeprefix("hf:"), config.finetune_dropout, "AutoModelForSequenceClassification",
        num_labels=len(task.labels), ignore_mismatched_sizes=True,
    )  # fmt: skip
    length = fitted(config, task).model.max_length
    run.begin([dict(i) for i in task.inputs])
    run.cut_metrics(0)
    with progress.phase("tokenizing"), ledger.phase("tokenizing"):
        texts = {split: encode(tokenizer, task.texts(split), length) for split in ("train", "dev")}
    targets = {split: np.array(task.targets(split)) for split in ("train", "dev", "test")}
    counter = Counter(model)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": stage.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=stage.lr)
    size = stage.batch or max(1, round(stage.batch_tokens / np.mean([len(text) for text in texts["train"]])))
    mixture = Mixture(2 * config.seed + 1, {TASK: len(texts["train"])}, {TASK: size}, 0)
    best, weights, since_best = {}, None, 0
    with progress.phase("finetune", stage.steps):
        for step in range(1, stage.steps + 1):
            with ledger.phase("finetune"):
                for group in optimizer.param_groups:
                    group["lr"] = stage.lr * schedule(stage.schedule, step - 1, stage.steps, stage.warmup)
                (drawn,) = mixture.draw(step - 1)
                batch = padded(tokenizer, [texts["train"][i] for i in drawn.examples])
                model.train()
                loss = F.cross_entropy(model(**batch).logits, torch.from_numpy(targets["train"][drawn.examples]))
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), stage.clip)
                optimizer.step()
                optimizer.zero_grad()
                ledger.flops += 3 * counter.forward(batch)
                ledger.tokens += int(batch["attention_mask"].sum())
            seconds = round(sum(ledger.seconds.values()), 3)
            if step % 10 == 0 or step == stage.steps:
                spent = {"tokens": ledger.tokens, "flops": ledger.flops, "seconds": seconds}
                losses = {"loss": loss.item(), "task_loss": loss.item(), "grad_norm": norm.item()}
                run.record(stage="finetune", step=step, kind="train", **losses, **spent)
                progress.update(step, stage.steps, f"task {loss.item():.3f}")
            if stage.eval_every and (step % stage.eval_every == 0 or step == stage.steps):
                with ledger.phase("evaluation"):
                    dev = scores(probabilities(model, tokenizer, texts["dev"]), targets["dev"])
                run.record(stage="finetune", step=step, kind="dev", **dev)
                since_best += 1
                if not best or (dev[task.metric], -dev["loss"]) > (best[task.metric], -best["loss"]):
                    best, since_best = dev | {"step": step}, 0
                    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                if 0 < stage.patience <= since_best:
                    break
    if weights:
        model.load_state_dict(weights)
    with progress.phase("test"), ledger.phase("test"):
        best = best or scores(probabilities(model, tokenizer, texts["dev"]), targets["dev"])
        found = None
        if config.test:
            found = probabilities(model, tokenizer, encode(tokenizer, task.texts("test"), length))
    parameters = sum(p.numel() for p in model.parameters())
    embeddings = model.get_input_embeddings().weight.numel()
    summary = {
        "name": run.folder.name,
        "task": task.name,
        "metric": task.metric,
        "labels": list(task.labels),
        "arm": arm_of(config),
        "seed": config.seed,
        "dev": best,
        "test": test_scores(task, found) if config.test else None,
        "model": {"parameters": parameters, "parameters_without_embeddings": parameters - embeddings},
        "data": {
            "train_examples": len(texts["train"]),
            "external_documents": 0,
            "external_tokens": 0,
            "report": task.report,
        },
        "selection": None,
        "cost": ledger.cost(parameters, config.price_per_hour),
        "config_sha256": run.config_sha256,
    }
    if config.test:
        write_text(run.folder / "predictions.jsonl", prediction_lines(task, found))
    write_json(run.summary_path, summary)
    return summary


def open_checkpoint(folder: str, dropout: float, kind: str = "AutoModel", **options):
    """(Tokenizer, model) of a folder that transformers wrote; `kind` names the class of it that opens the model, which
    gets a fresh head if the folder has none."""
    try:
        import transformers
    except ImportError:
        raise InputError(f"init_from=hf:{folder}: transformers is missing; pip install transformers") from None
    if not (Path(folder) / "config.json").exists():
        raise InputError(f"init_from=hf:{folder}: no checkpoint there (no config.json); name a folder of transformers")
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = getattr(transformers, kind).from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, **options
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"init_from=hf:{folder}: transformers cannot open it ({reason}); give another folder"
        ) from None
    if tokenizer.pad_token_id is None:
        raise InputError(f"init_from=hf:{folder}: its tokenizer has no token to pad with; give an encoder's checkpoint")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return tokenizer, model


def encode(tokenizer, texts: list[str], max_length: int) -> list[list[int]]:
    most = min(max_length, tokenizer.model_max_length)
    return tokenizer(texts, truncation=True, max_length=most)["input_ids"] if texts else []


def padded(tokenizer, texts: list[list[int]]) -> dict[str, torch.Tensor]:
    return dict(tokenizer.pad({"input_ids": texts}, pad_to_multiple_of=MULTIPLE, return_tensors="pt"))


@torch.no_grad()
def probabilities(model, tokenizer, texts: list[list[int]]) -> np.ndarray:
    """float64[N, labels]"""
    model.eval()
    found = np.zeros((len(texts), model.config.num_labels))
    for batch in batches_by_length(np.array([len(text) for text in texts]), TOKENS_PER_BATCH):
        logits = model(**padded(tokenizer, [texts[i] for i in batch])).logits
        found[batch] = logits.double().softmax(-1).numpy()
    return found


class Counter:
    """Floating-point operations of forward passes, counted once for each shape of batch."""

    def __init__(self, model):
        self.model, self.known = model, {}

    def forward(self, batch: dict[str, torch.Tensor]) -> int:
        from torch.utils.flop_counter import FlopCounterMode

        shape = tuple(batch["input_ids"].shape)
        if shape not in self.known:
            with torch.random.fork_rng([]), torch.no_grad(), FlopCounterMode(display=False) as mode:  # dropout draws
                self.model(**batch)
            self.known[shape] = mode.get_total_flops()
        return self.known[shape]
