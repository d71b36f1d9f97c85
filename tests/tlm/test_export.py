import importlib
import json
import os
import sys

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ModernBertDecoderForCausalLM,
    pipeline,
)

from tasks.errors import InputError
from tlm.batches import pack
from tlm.cli import main
from tlm.export import export, export_run
from tlm.generate import generate
from tlm.model import ModelShape, Transformer, save_model
from tlm.tokenizer import SEP, load_tokenizer, save_tokenizer, train_tokenizer
from tlm.zeroshot import open_run

LABELS = ("sport", "trade & more", 'été: "x"')
TEXTS = ["A short text.", "", "The [MASK] of Python's data model: `__init__` runs " + "again and again " * 40, "été"]
SUMMARY = {
    "name": "bbc-tlm", "task": "bbc", "metric": "macro_f1", "labels": list(LABELS), "arm": "tlm", "seed": 3,
    "dev": {"loss": 0.5, "accuracy": 0.91, "macro_f1": 0.8912, "micro_f1": 0.91, "calibration_error": 0.05, "step": 80},
    "test": {"loss": 0.6, "accuracy": 0.8765, "macro_f1": 0.8512, "micro_f1": 0.8765, "calibration_error": 0.05,
             "macro_f1_interval": [0.82, 0.88]},
    "model": {"parameters": 12345, "parameters_without_embeddings": 2345, "hidden": 32, "layers": 2, "max_length": 48},
    "data": {"train_examples": 50, "external_documents": 4321, "external_tokens": 9876, "external_tokens_seen": 12345},
    "cost": {"flops": 123456789012345, "flops_paper": 1, "tokens": 1300000, "peak_rss_bytes": 1.5e9,
             "seconds": {"retrieval": 1.5, "joint": 200.2, "warm_start": 3.0}},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, real_text):
    """A run folder as training leaves it, with weights far from their start."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_tokenizer(real_text[:300], vocabulary=600)
    shape = ModelShape(tokenizer.get_vocab_size(), 32, layers=2, heads=2, intermediate=48, max_length=48, num_labels=3)
    model = Transformer(shape, torch.Generator().manual_seed(0), "scaled")
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    save_model(model, folder / "model", LABELS)
    save_tokenizer(tokenizer, folder / "model" / "tokenizer.json")
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    return folder, model.eval(), tokenizer


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "model"
    assert export_run(str(run[0]), str(out)) == 0
    return out


def ids(tokenizer, text, max_length=48):
    """[CLS], the first tokens, [SEP]: how training cuts a text."""
    cls, *inner, sep = tokenizer.encode(text).ids
    return torch.tensor([cls, *inner[: max_length - 2], sep]).numpy()


def test_transformers_opens_it_and_gives_the_same_logits(run, exported):
    _, model, own_tokenizer = run
    tokenizer = AutoTokenizer.from_pretrained(exported)
    theirs, loading = AutoModelForSequenceClassification.from_pretrained(exported, output_loading_info=True)
    assert not any(loading.values()), loading
    assert tokenizer.is_fast
    assert tokenizer.model_max_length == 48
    names = ("pad", "unk", "cls", "sep", "mask")
    assert [getattr(tokenizer, f"{name}_token") for name in names] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert [getattr(tokenizer, f"{name}_token_id") for name in names] == [0, 1, 2, 3, 4]
    inputs = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    assert sorted(inputs) == ["attention_mask", "input_ids"]
    batch = pack([ids(own_tokenizer, text) for text in TEXTS])
    assert inputs["attention_mask"].sum(1).tolist() == list(batch.lengths)
    assert max(batch.lengths) == 48
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs).logits, model.classify(model(batch), batch), atol=1e-5, rtol=0)
    assert theirs.config.id2label == dict(enumerate(LABELS))
    assert not theirs.training


def test_a_pipeline_answers_with_the_labels_names(run, exported):
    _, model, own_tokenizer = run
    answers = pipeline("text-classification", str(exported))(TEXTS, truncation=True)
    batch = pack([ids(own_tokenizer, text) for text in TEXTS])
    with torch.no_grad():
        best = model.classify(model(batch), batch).softmax(-1).max(-1)
    assert [answer["label"] for answer in answers] == [LABELS[i] for i in best.indices]
    assert [answer["score"] for answer in answers] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_the_masked_lm_kind_gives_the_same_logits(run, tmp_path):
    folder, model, own_tokenizer = run
    export(folder / "model", folder / "model" / "tokenizer.json", SUMMARY, tmp_path / "mlm", kind="mlm")
    theirs, loading = AutoModelForMaskedLM.from_pretrained(tmp_path / "mlm", output_loading_info=True)
    assert not any(loading.values()), loading
    inputs = AutoTokenizer.from_pretrained(tmp_path / "mlm")(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        logits = theirs(**inputs).logits
        for i, text in enumerate(TEXTS):
            batch = pack([ids(own_tokenizer, text)])
            own = model.mlm_logits(model(batch))
            torch.testing.assert_close(logits[i, : len(own)], own, atol=1e-5, rtol=0)


def test_the_card_can_be_read_and_holds_the_scores(exported):
    card = ModelCard.load(exported / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.datasets == ["bbc"]
    found = {(result.metric_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert found == {("Accuracy", "accuracy"): 0.8765, ("Macro F1", "f1"): 0.8512, ("Micro F1", "f1"): 0.8765}
    for fact in ("4,321 documents", "50 labelled", "82.0% to 88.0%", "1.23e+14", "joint 200", "85.1%", "BM25"):
        assert fact in card.text, fact


def test_transformers_is_not_imported(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # from here on importing it raises
    monkeypatch.delitem(sys.modules, "tlm.export")
    with pytest.raises(ImportError):
        importlib.import_module("transformers")
    importlib.import_module("tlm.export").export_run(str(run[0]), str(tmp_path / "out"))
    assert (tmp_path / "out" / "config.json").exists()


def test_an_empty_folder_is_filled_and_a_full_one_refused(run, exported, tmp_path):
    (tmp_path / "out").mkdir()
    export_run(str(run[0]), str(tmp_path / "out"))
    before = sorted(os.listdir(tmp_path / "out"))
    assert before == sorted(os.listdir(exported))
    with pytest.raises(InputError, match="out: exists and is not an empty folder"):
        export_run(str(run[0]), str(tmp_path / "out"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: exists"):
        export_run(str(run[0]), str(tmp_path / "file"))
    with pytest.raises(InputError, match="cannot be written"):
        export_run(str(run[0]), str(tmp_path / "file" / "below"))
    assert sorted(os.listdir(tmp_path)) == ["file", "out"]


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(run, tmp_path, real_text):
    folder, _, _ = run
    other = tmp_path / "tokenizer.json"
    save_tokenizer(train_tokenizer(real_text[:50], vocabulary=300), other)
    with pytest.raises(InputError, match=r"tokenizer\.json: has 300 tokens, the model 600"):
        export(folder / "model", other, SUMMARY, tmp_path / "out")
    for summary, message in (({"arms": {"tlm": {}, "scratch": {}}}, "scratch, tlm"), ({"arm": "tfidf"}, "TF-IDF")):
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        with pytest.raises(InputError, match=message):
            export_run(str(tmp_path), str(tmp_path / "out"))
    with pytest.raises(InputError, match="no finished run"):
        export_run(str(tmp_path / "nowhere"), str(tmp_path / "out"))
    save_model(run[1], tmp_path / "model")
    with pytest.raises(InputError, match="0 labels of 3"):
        export(tmp_path / "model", folder / "model" / "tokenizer.json", SUMMARY, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["model", "summary.json", "tokenizer.json"]
    assert load_tokenizer(other).get_vocab_size() == 300


def test_a_causal_run_opens_as_a_decoder_with_the_same_logits(pretrained, tmp_path):
    assert export_run(str(pretrained), str(tmp_path / "out")) == 0
    theirs, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert isinstance(theirs, ModernBertDecoderForCausalLM)
    assert not any(loading.values()), loading
    tokenizer, own = AutoTokenizer.from_pretrained(tmp_path / "out"), open_run(str(pretrained))
    texts = ["What is it about?", "the film of the year, and the award. Is it even?"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    prompts = [own.reader.prompt(ids, 1, None) for ids in own.reader.encode(texts)]
    assert [row[row != 0].tolist() for row in inputs["input_ids"]] == [prompt.tolist() for prompt in prompts]
    batch = pack(prompts)
    with torch.no_grad():
        logits = theirs(**inputs).logits
        flat = torch.cat([logits[i, -len(prompts[i]) :] for i in np.argsort(batch.lengths)])
        torch.testing.assert_close(flat, own.model.mlm_logits(own.model(batch)), atol=1e-5, rtol=0)
        said = theirs.generate(**tokenizer(texts[0], return_tensors="pt"), max_new_tokens=8, do_sample=False)
    ours, ended = generate(own.model, prompts[:1], 8)[0].tolist(), [*said[0, len(prompts[0]) :].tolist(), SEP]
    assert ours == ended[: ended.index(SEP)]
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag == "text-generation"
    assert "3 tasks" in card.text


def test_what_has_no_decoder_in_transformers_is_refused(general_run, tmp_path, capsys):
    assert main(["export", str(general_run), f"out={tmp_path / 'out'}"]) == 2
    assert "attention=causal" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
