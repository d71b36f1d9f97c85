"""A trained model packed for the CPU kernels: what it answers, as a file, and for those who open its exports."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tasks.errors import InputError
from tlm.batches import pack
from tlm.cli import main
from tlm.export import export_run
from tlm.lowbit import take_odd
from tlm.lowbit.cpu.packed import linear_by_torch
from tlm.lowbit.inference import FILE, Fused, PackedLinear, load_packed, pack_model, save_packed
from tlm.model import ModelShape, Transformer, save_model
from tlm.tokenizer import save_tokenizer, train_tokenizer

SHAPE = ModelShape(300, 64, 2, 2, 96, 48, 3)
LABELS = ("sport", "trade", "stage")
TEXTS = [np.arange(2, 14), np.arange(5, 45), np.arange(9, 12)]
SUMMARY = json.loads("""{
    "name": "bbc-tlm", "task": "bbc", "metric": "macro_f1", "arm": "tlm", "seed": 3, "test": null,
    "dev": {"loss": 0.5, "accuracy": 0.91, "macro_f1": 0.8912, "micro_f1": 0.91, "calibration_error": 0.05},
    "model": {"parameters": 1, "parameters_without_embeddings": 1, "hidden": 64, "layers": 2, "max_length": 48},
    "data": {"train_examples": 50, "external_documents": 0, "external_tokens": 0, "external_tokens_seen": 0},
    "cost": {"flops": 1, "tokens": 1, "peak_rss_bytes": 1.5e9, "seconds": {"joint": 2.0}}}""")


def model_of(recipe=None, **changes):
    """Weights far from their start."""
    model = Transformer(replace(SHAPE, recipe=recipe, **changes), torch.Generator().manual_seed(0), "scaled").eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    return model


@torch.no_grad()
def logits(model):
    batch = pack(TEXTS)
    return model.classify(model(batch), batch)


@pytest.mark.parametrize("recipe", ["ternary", "binary", "int8"])
def test_a_packed_model_answers_as_it_was_trained(recipe):
    """The emulation that trained it: the same integers, sums of another order."""
    model = model_of(recipe)
    trained = logits(model)
    conversion = pack_model(model, recipe)
    assert len(conversion.converted) == 8
    assert conversion.left["head.dense"] == "a head"
    torch.testing.assert_close(logits(model), trained, rtol=1e-3, atol=1e-3)
    assert isinstance(model.model.layers[0].mlp, Fused)
    assert not take_odd(model)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_int8_of_an_fp32_model_is_near_it(activation):
    model = model_of(activation=activation)
    plain = logits(model)
    pack_model(model, "int8")
    assert isinstance(model.model.layers[0].mlp, Fused) == (activation == "gelu")  # the kernel knows no other
    assert 0 < (logits(model) - plain).abs().max() < 0.05 * plain.abs().max()


def test_by_torch_it_answers_the_same(monkeypatch):
    model = model_of()
    pack_model(model, "int8")
    by_kernel = logits(model)
    monkeypatch.setattr("tlm.lowbit.inference.linear", linear_by_torch)
    torch.testing.assert_close(logits(model), by_kernel, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("recipe", "asked", "said"),
    [
        (None, "ternary", "precision=ternary: the model was trained in fp32; set precision=int8"),
        ("binary", "int8", "precision=int8: the model was trained by precision=binary; set precision=binary"),
        ("mxfp8", "mxfp8", "precision=mxfp8: is not for inference on a CPU; use one of int8, ternary, binary"),
    ],
)
def test_what_it_was_not_trained_for_is_refused(recipe, asked, said):
    with pytest.raises(InputError, match=said):
        pack_model(model_of(recipe), asked)


def test_rows_that_are_no_number_are_counted():
    model = model_of()
    pack_model(model, "int8")
    with torch.no_grad():
        model.model.embeddings.tok_embeddings.weight[5] = math.nan
    assert logits(model).isnan().any(1).tolist() == [True, True, False]
    assert take_odd(model)["input blocks with NaN or infinity"] >= 8


# --- as a file ------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    model = model_of("ternary")
    pack_model(model, "ternary")
    (tmp_path / "model.json").write_text(json.dumps({"shape": model.shape.__dict__, "labels": list(LABELS)}))
    save_packed(model, tmp_path)
    return tmp_path, logits(model)


def test_a_saved_one_answers_to_the_bit_and_is_small(saved):
    folder, answers = saved
    assert torch.equal(logits(load_packed(folder)), answers)
    tensors = load_file(folder / FILE)
    packed = sum(t.numel() for name, t in tensors.items() if name.endswith(".panels"))
    matrices = 2 * (3 * 64 * 64 + 64 * 64 + 2 * 96 * 64 + 96 * 64)
    assert packed == matrices / 4


@pytest.mark.parametrize("where", ["weights", "scales", "embeddings"])
def test_a_flipped_bit_is_one_sentence(saved, where):
    folder, _ = saved
    content = bytearray((folder / FILE).read_bytes())
    head = 8 + int.from_bytes(content[:8], "little")
    name = {"weights": "Wqkv.panels", "scales": "Wo.scales", "embeddings": "tok_embeddings.weight"}[where]
    described = json.loads(content[8:head])
    start = next(value["data_offsets"][0] for key, value in described.items() if key.endswith(name))
    content[head + start] ^= 1
    (folder / FILE).write_bytes(content)
    with pytest.raises(InputError, match=rf"{FILE}: damaged \(its checksum is another\)"):
        load_packed(folder)


def test_another_version_and_a_cut_file_are_one_sentence(saved):
    folder, _ = saved
    with safe_open(folder / FILE, "pt") as file:
        head = file.metadata()
    whole = (folder / FILE).read_bytes()
    save_file(load_file(folder / FILE), folder / FILE, head | {"version": "7"})
    with pytest.raises(InputError, match="of version 7, and this program reads 1; export it again"):
        load_packed(folder)
    (folder / FILE).write_bytes(whole[:-10])
    with pytest.raises(InputError, match="cannot be read"):
        load_packed(folder)


# --- runs and exports -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, real_text):
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_tokenizer(real_text[:300], vocabulary=600)
    model = model_of(vocabulary=tokenizer.get_vocab_size())
    save_model(model, folder / "model", LABELS)
    save_tokenizer(tokenizer, folder / "model" / "tokenizer.json")
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {"labels": list(LABELS)}))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in real_text[:20]))
    return folder


def predictions(folder, file, capsys, *keys):
    capsys.readouterr()
    assert main(["predict", str(folder), str(file), "threads=1", *keys]) == 0
    lines = map(json.loads, capsys.readouterr().out.splitlines())
    return np.array([list(line["probabilities"].values()) for line in lines])


def test_predict_by_the_kernels_and_of_a_packed_export(run, tmp_path, capsys):
    plain = predictions(run, run / "texts.jsonl", capsys)
    int8 = predictions(run, run / "texts.jsonl", capsys, "precision=int8")
    assert len(plain) == 20
    assert 0 < abs(int8 - plain).max() < 0.05
    assert main(["export", str(run), f"out={tmp_path / 'small'}", "quant=packed"]) == 0
    assert "int8, packed: 8 matrices converted; " in capsys.readouterr().out
    assert np.array_equal(predictions(tmp_path / "small", run / "texts.jsonl", capsys), int8)
    assert main(["predict", str(tmp_path / "small"), str(run / "texts.jsonl"), "precision=binary"]) == 2
    assert "packed.safetensors holds 8 bits a weight; leave the key out" in capsys.readouterr().err
    assert main(["predict", str(run), str(run / "texts.jsonl"), "precision=ternary"]) == 2
    assert "precision=ternary: the model was trained in fp32" in capsys.readouterr().err


@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_transformers_opens_it_with_bitsandbytes(quant, run, tmp_path, capsys):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    transformers = pytest.importorskip("transformers")
    export_run(str(run), str(tmp_path / "plain"))
    assert main(["export", str(run), f"out={tmp_path / quant}", f"quant={quant}"]) == 0
    told = capsys.readouterr().out
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / quant)
    kind = bitsandbytes.nn.Linear8bitLt if quant == "int8" else bitsandbytes.nn.Linear4bit
    small = [name for name, m in theirs.named_modules() if isinstance(m, kind)]
    if quant == "nf4":  # blocks of 64 along the inputs, of which mlp.Wo has 96
        assert len(small) == 6
        assert "2 left (no multiple of 64 inputs: model.layers.0.mlp.Wo, model.layers.1.mlp.Wo)" in told
    else:
        assert len(small) == 8
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / quant)
    inputs = tokenizer(["A short text.", "An other one, on the market."], padding=True, return_tensors="pt")
    with torch.no_grad():
        near, exact = theirs(**inputs).logits, plain(**inputs).logits
    assert theirs.config.id2label == dict(enumerate(LABELS))
    assert 0 < (near - exact).abs().max() < (0.05 if quant == "int8" else 0.3) * exact.abs().max()


def test_onnx_runtime_opens_it(run, tmp_path, capsys):
    onnxruntime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    export_run(str(run), str(tmp_path / "plain"))
    assert main(["export", str(run), f"out={tmp_path / 'onnx'}", "quant=onnx-int8"]) == 0
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "onnx")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    inputs = tokenizer(["A short text.", "An other, longer one, on the market."], padding=True, return_tensors="pt")
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    (near,) = session.run(["logits"], {name: t.numpy() for name, t in inputs.items()})
    with torch.no_grad():
        exact = plain(**inputs).logits.numpy()
    assert 0 < abs(near - exact).max() < 0.1 * abs(exact).max()
    kinds = [node.op_type for node in onnx.load(tmp_path / "onnx" / "model.onnx").graph.node]
    assert kinds.count("MatMulInteger") == 8
    assert not (tmp_path / "onnx" / "model.safetensors").exists()


@pytest.mark.parametrize(("quant", "module"), [("nf4", "bitsandbytes"), ("onnx-int8", "onnx")])
def test_what_is_missing_is_one_sentence_and_leaves_nothing(quant, module, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    assert main(["export", str(run), f"out={tmp_path / 'out'}", f"quant={quant}"]) == 2
    assert f"quant={quant}: {module} is missing; pip install" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_modules_that_hold_weights_are_those_of_the_file(saved):
    model = load_packed(saved[0])
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 8


def test_small_products_stay_as_they_are():
    model = model_of(hidden=32, intermediate=48)
    conversion = pack_model(model, "int8")
    assert not conversion.converted
    small = [n for n, reason in conversion.left.items() if reason == "fewer than 4,096 weights save no time"]
    assert len([name for name in small if ".layers." in name]) == 8
