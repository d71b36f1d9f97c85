"""A finished run as a folder that `transformers` opens with none of our code.

The model has ModernBERT's layout and names (see model.py), so this is a copy of tensors, a config.json written by hand,
the tokenizer's own file and a model card. `transformers` itself is not imported: its config classes would save thirty
lines here and cost a heavy dependency. The tests open the folder with it and compare logits. `quant=`
writes weights of fewer bits: those of bitsandbytes for transformers (by these two), of ONNX Runtime, of our kernels.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tasks.errors import InputError
from tlm.run import read_json, write_json, write_text


@dataclass(frozen=True)
class Kind:
    architecture: str  # class of transformers
    pipeline: str  # its task name on model hubs
    heads: Mapping[str, str]  # prefix of our tensors -> prefix of theirs; the encoder's names are the same


KINDS = {
    "classification": Kind(
        "ModernBertForSequenceClassification",
        "text-classification",
        {"model.": "model.", "head.": "head.", "classifier.": "classifier."},
    ),
    "mlm": Kind(
        "ModernBertForMaskedLM",
        "fill-mask",
        {"model.": "model.", "mlm_head.": "head.", "decoder.": "decoder."},
    ),
    "causal": Kind(
        "ModernBertDecoderForCausalLM",
        "text-generation",
        {"model.": "model.", "mlm_head.": "lm_head.", "decoder.": "decoder."},
    ),
}
SPECIALS = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}


def export_run(run: str, out: str, quant: str | None = None) -> int:
    """`tlm export RUN out=DIR quant=Q`."""
    folder = Path(run)
    if not (folder / "summary.json").exists():
        raise InputError(f"{run}: holds no finished run (no summary.json); name a finished run, such as runs/NAME")
    summary = read_json(folder / "summary.json")
    if "arms" in summary:
        raise InputError(f"{run}: holds several runs; name one of {', '.join(sorted(summary['arms']))} inside it")
    if summary["arm"] == "tfidf":
        raise InputError(f"{run}: is TF-IDF with logistic regression, no model for transformers; name a neural run")
    if summary["arm"] == "bi-encoder":
        raise InputError(f"{run}: is a bi-encoder, whose encoder transformers opens as it is: {run}/model/encoder")
    if summary["arm"] == "pretraining":
        raise InputError(
            f"{run}: knows no labels, it was made to start from; name a run that does (init_from={run}/model)"
        )
    attention = summary["model"].get("attention", "bidirectional")
    if attention == "prefix":
        raise InputError(
            f"{run}: reads prompts both ways, which no decoder of transformers does; export a run of attention=causal"
        )
    kind = "causal" if attention == "causal" else "classification"
    if quant and kind == "causal":
        raise InputError(f"quant={quant}: is for runs that classify, which {run} does not; leave it out")
    if quant == "packed":
        left = export_packed(folder / "model", summary, Path(out))
    else:
        left = export(folder / "model", folder / "model" / "tokenizer.json", summary, Path(out), kind, quant)
    if left:
        print(f"{out}: {left}")
    opened = OPEN_WITH.get(quant) or f'transformers.pipeline("{KINDS[kind].pipeline}", "{{out}}")'
    print(f"{out}: open it with {opened.format(out=out)}")
    return 0


OPEN_WITH = {  # what is no pipeline of transformers
    "onnx-int8": 'onnxruntime.InferenceSession("{out}/model.onnx")',
    "packed": "`tlm predict {out} FILE`",
}


def export(
    model_folder: Path,
    tokenizer_path: Path,
    summary: dict,
    out: Path,
    kind: str = "classification",
    quant: str | None = None,
) -> str:
    """Write `out` whole or not at all; return what was merged, and what `quant` did. `kind` is the
    head: classification, mlm, or causal.

    `summary` is the run's summary.json, for the model card. Raises InputError if `out` is not new or empty, the model
    is damaged, the tokenizer is not its own, or what `quant` needs is missing.
    """
    from tlm.lowbit import merge, weights_as_read
    from tlm.model import load_model, write_tensors
    from tlm.tokenizer import own_tokenizer, save_tokenizer

    model = load_model(model_folder)
    merged = merge(model)
    tokenizer = own_tokenizer(tokenizer_path, model.shape.vocabulary, summary.get("tokenizer_sha256"))
    if model.shape.soft:
        raise InputError(
            f"{model_folder}: has soft prompts, for which transformers has no place; train with pool.soft=0"
        )
    labels = read_json(model_folder / "model.json")["labels"]
    if kind != "causal" and len(labels) != model.shape.num_labels:
        raise InputError(
            f"{model_folder}: model.json names {len(labels)} labels of {model.shape.num_labels}; give a finished model"
        )
    tensors = {
        theirs + name.removeprefix(ours): tensor
        for name, tensor in (apart if kind == "causal" else dict)(weights_as_read(model)).items()
        for ours, theirs in KINDS[kind].heads.items()
        if name.startswith(ours)
    }
    special_ids = {name: tokenizer.token_to_id(token) for name, token in SPECIALS.items()}
    left = merged
    with whole(out) as temporary:
        write_tensors(temporary / "model.safetensors", tensors)
        save_tokenizer(tokenizer, temporary / "tokenizer.json")
        write_json(temporary / "tokenizer_config.json", tokenizer_config(model.shape.max_length, kind))
        write_json(temporary / "special_tokens_map.json", SPECIALS)
        write_json(temporary / "config.json", config(model.shape, labels, special_ids, kind))
        write_text(temporary / "README.md", generative_card(summary) if kind == "causal" else card(summary, kind))
        if quant == "onnx-int8":
            to_onnx(model, temporary)
        elif quant:
            left = "; ".join(filter(None, [merged, to_bitsandbytes(temporary, quant, KINDS[kind])]))
    return left


@contextlib.contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A new folder, which becomes `out` at the end, or goes. Raises InputError if `out` is not new or empty."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out}: exists and is not an empty folder; name a new one")
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); make room or name another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def apart(weights: Mapping[str, Any]) -> dict[str, Any]:
    """With queries, keys and values as three matrices, as the decoder has them."""
    result = dict(weights)
    for name in [name for name in weights if name.endswith(".Wqkv.weight")]:
        for part, matrix in zip("qkv", result.pop(name).chunk(3), strict=True):
            result[name.replace("Wqkv", f"{part}_proj")] = matrix
    return result


def to_bitsandbytes(folder: Path, quant: str, kind: Kind) -> str:
    """The layers' matrices of an exported folder in 8 bits (LLM.int8) or 4 (NF4), by transformers with bitsandbytes."""
    try:
        import bitsandbytes  # noqa: F401
        import torch
        import transformers
    except ImportError as error:
        raise InputError(f"quant={quant}: {error.name} is missing; pip install 'tlm[lowbit]' transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    architecture = getattr(transformers, kind.architecture)
    plain = architecture.from_pretrained(folder)
    matrices = {name: m for name, m in plain.named_modules() if isinstance(m, torch.nn.Linear)}
    heads = [name for name in matrices if not name.startswith("model.layers.")]
    cut = [n for n, m in matrices.items() if n not in heads and quant == "nf4" and m.in_features % NF4_BLOCK]
    if len(heads) + len(cut) == len(matrices):
        raise InputError(f"quant=nf4: no matrix of the layers has a multiple of {NF4_BLOCK} inputs; use quant=int8")
    settings = transformers.BitsAndBytesConfig(
        load_in_8bit=quant == "int8", load_in_4bit=quant == "nf4", bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=[*heads, *cut],
    )  # fmt: skip
    architecture.from_pretrained(folder, quantization_config=settings).save_pretrained(folder)
    done = len(matrices) - len(heads) - len(cut)
    left = f"; {len(cut)} left (no multiple of {NF4_BLOCK} inputs: {', '.join(cut)})" if cut else ""
    return f"{quant}: {done} matrices converted; {len(heads)} left (a head){left}"


NF4_BLOCK = 64


def to_onnx(model: Any, folder: Path) -> None:
    """model.onnx in int8 in the place of the weights for transformers; names in and out are in onnx_graph.py."""
    from tlm.lowbit import weights_as_read
    from tlm.model import Transformer
    from tlm.onnx_graph import to_int8, write

    plain = Transformer(replace(model.shape, recipe=None), generator=None)
    plain.load_state_dict(weights_as_read(model))
    write(plain, folder / "model.onnx")
    to_int8(folder / "model.onnx")
    (folder / "model.safetensors").unlink()


def export_packed(model_folder: Path, summary: dict, out: Path) -> str:
    """A folder for `tlm predict`: the run's summary, tokenizer and model, its layers as our kernels read them."""
    from tlm.lowbit import merge
    from tlm.lowbit.inference import own_precision, pack_model, save_packed
    from tlm.model import load_model

    model = load_model(model_folder)
    merged = merge(model)
    conversion = pack_model(model, own_precision(model.shape))
    with whole(out) as temporary:
        write_json(temporary / "summary.json", summary)
        (temporary / "model").mkdir()
        described = read_json(model_folder / "model.json")
        write_json(temporary / "model" / "model.json", described | {"shape": asdict(model.shape)})
        shutil.copyfile(model_folder / "tokenizer.json", temporary / "model" / "tokenizer.json")
        save_packed(model, temporary / "model")
    return "; ".join(filter(None, [merged, str(conversion)]))


def config(shape: Any, labels: list[str], special_ids: dict[str, int], kind: str) -> dict:
    """config.json of a ModernBertConfig (transformers 5); the last three say the same to transformers 4.48 on."""
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
    return {
        "architectures": [KINDS[kind].architecture],
        "model_type": "modernbert-decoder" if kind == "causal" else "modernbert",
        "dtype": "float32",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "hidden_activation": shape.activation,
        "max_position_embeddings": shape.max_length,
        "norm_eps": shape.norm_eps,
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "decoder_bias": True,
        "classifier_bias": False,
        "classifier_activation": "gelu",
        "classifier_pooling": shape.pooling,
        "classifier_dropout": 0.0,
        "embedding_dropout": shape.dropout,
        "attention_dropout": shape.dropout,
        "mlp_dropout": shape.dropout,
        "tie_word_embeddings": True,
        "layer_types": ["full_attention"] * shape.layers,
        "rope_parameters": {"full_attention": rope, "sliding_attention": rope},
        "pad_token_id": special_ids["pad_token"],
        "cls_token_id": special_ids["cls_token"],
        "sep_token_id": special_ids["sep_token"],
        "bos_token_id": special_ids["cls_token"],
        "eos_token_id": special_ids["sep_token"],
        **({} if kind == "causal" else label_config(labels)),
        "global_attn_every_n_layers": 1,
        "global_rope_theta": shape.rope_theta,
        "local_rope_theta": shape.rope_theta,
    }


def label_config(labels: list[str]) -> dict:
    return {
        "problem_type": "single_label_classification",
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def tokenizer_config(max_length: int, kind: str) -> dict:
    causal = {"bos_token": SPECIALS["cls_token"], "eos_token": SPECIALS["sep_token"], "padding_side": "left"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],  # the model knows no token types
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
        **SPECIALS,
        **(causal if kind == "causal" else {}),
    }


METRICS = {"accuracy": ("accuracy", "Accuracy"), "macro_f1": ("f1", "Macro F1"), "micro_f1": ("f1", "Micro F1")}
METHODS = {
    "scratch": "It saw the task's training texts and nothing else.",
    "tlm": "Beside the task's training texts it saw general documents that BM25 retrieved with these texts as queries.",
    "random": "Beside the task's training texts it saw general documents drawn at random.",
}


def card(summary: dict, kind: str) -> str:
    """The model card: a YAML head for model hubs, then data, training, scores, cost and limits, out of `summary`."""
    import yaml

    task, metric, model, data, cost = (summary[key] for key in ("task", "metric", "model", "data", "cost"))
    split = "test" if summary["test"] else "dev"
    known = [name for name in METRICS if name in summary[split]]
    results = [
        {"type": METRICS[name][0], "name": METRICS[name][1], "value": round(summary[split][name], 4)} for name in known
    ]
    dataset = {"type": task, "name": task, "split": split}
    head = {
        "library_name": "transformers",
        "pipeline_tag": KINDS[kind].pipeline,
        "license": "other",
        "license_name": "not-yet-chosen",
        "tags": ["tlm", "modernbert", "trained-from-scratch"],
        "datasets": [task],
        "metrics": sorted({result["type"] for result in results}),
        "model-index": [
            {
                "name": summary["name"],
                "results": [{"task": {"type": "text-classification"}, "dataset": dataset, "metrics": results}],
            }
        ],
    }
    splits = ("dev", "test") if summary["test"] else ("dev",)
    rows = [["metric", *splits], ["---"] * (1 + len(splits))]
    rows += [[METRICS[name][1], *(f"{summary[split][name]:.1%}" for split in splits)] for name in known]
    scores = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    if summary["test"]:
        low, high = summary["test"][f"{metric}_interval"]
        care = (
            f"{METRICS[metric][1]} is the task's metric; its 95% bootstrap interval on test: {low:.1%} to {high:.1%}.\n"
            "It covers the choice of test texts only, not that of the seed. Test was read once, after training."
        )
    else:
        care = "The weights were chosen by these scores on dev, which are hence too good; test has not been read."
    external = (
        f"{data['external_documents']:,} documents of general text ({data['external_tokens']:,} tokens; "
        f"{data['external_tokens_seen']:,} seen in training, repeats included)"
        if data["external_documents"]
        else "no other text"
    )
    method = METHODS.get(summary["arm"], f"Documents beside the task's own were chosen by `{summary['arm']}`.")
    phases = ", ".join(f"{name.replace('_', ' ')} {seconds:,.0f}" for name, seconds in cost["seconds"].items())
    call = f'"A text, maybe {SPECIALS["mask_token"]}."' if kind == "mlm" else '"A text.", truncation=True'
    return f"""---
{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---

# {summary["name"]}

A classifier of texts into {len(summary["labels"])} labels ({", ".join(summary["labels"])}), trained from scratch by
[TLM](https://arxiv.org/abs/2111.04130): no pretrained model stands behind it. ModernBERT's layout with full attention,
{model["layers"]} layers of {model["hidden"]}, {model["parameters"]:,} parameters
({model["parameters_without_embeddings"]:,} without embeddings).

```python
from transformers import pipeline

ask = pipeline("{KINDS[kind].pipeline}", "PATH/OF/THIS/FOLDER")
ask({call})
```

## Data

Task `{task}`: {data["train_examples"]:,} labelled training texts, and {external}.

## Training

{method}
The weights are those with the best dev score. Seed {summary["seed"]}.

## Scores

{scores}

{care}

## Cost

{cost["flops"]:.3g} floating-point operations, {cost["tokens"]:,} tokens,
{cost["peak_rss_bytes"] / 1e9:.1f} GB of memory. Seconds: {phases}.

## Limits

It knows this task's labels and the kind of text it was trained on, and answers with one of them whatever it is given.
Texts are lower-cased, and read up to {model["max_length"]} tokens. What its training text says unfairly it may repeat.
The licence of the weights is yours to choose; mind those of the texts.
"""


def generative_card(summary: dict) -> str:
    """The model card of a decoder that was trained on a pool."""
    import yaml

    model, data, cost = (summary[key] for key in ("model", "data", "cost"))
    head = {
        "library_name": "transformers",
        "pipeline_tag": KINDS["causal"].pipeline,
        "license": "other",
        "license_name": "not-yet-chosen",
        "tags": ["tlm", "modernbert-decoder", "trained-from-scratch", "zero-shot"],
    }
    external = (
        f"{data['external_documents']:,} documents of general text that their training inputs retrieved"
        if data["external_documents"]
        else "no other text"
    )
    phases = ", ".join(f"{name.replace('_', ' ')} {seconds:,.0f}" for name, seconds in cost["seconds"].items())
    return f"""---
{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---

# {summary["name"]}

A generative model trained from scratch on many prompted tasks ([ZeroPrompt](https://arxiv.org/abs/2201.06910)): no
pretrained model stands behind it. ModernBERT's decoder with full attention, {model["layers"]} layers of
{model["hidden"]}, {model["parameters"]:,} parameters ({model["parameters_without_embeddings"]:,} without embeddings).

It reads `[CLS] prompt [SEP]` and says `answer [SEP]`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH/OF/THIS/FOLDER")
model = AutoModelForCausalLM.from_pretrained("PATH/OF/THIS/FOLDER")
said = model.generate(**tokenizer("A prompt.", return_tensors="pt"), max_new_tokens=20)  # the tokenizer adds both marks
```

## Data

{data["tasks"]:,} tasks of {len(data["categories"])} categories ({", ".join(data["categories"])}),
{data["train_examples"]:,} instances, and {external}. Other categories were held out.

## Cost

{cost["flops"]:.3g} floating-point operations, {cost["tokens"]:,} tokens,
{cost["peak_rss_bytes"] / 1e9:.1f} GB of memory. Seconds: {phases}. Seed {summary["seed"]}.

## Limits

Texts are lower-cased, and read up to {model["max_length"]} tokens. What it says may be wrong, and what its training
text says unfairly it may repeat. The licence of the weights is yours to choose; mind those of the texts.
"""
