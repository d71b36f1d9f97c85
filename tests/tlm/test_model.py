import resource
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    ModernBertConfig,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
)

from tasks.errors import InputError
from tlm.batches import IGNORE, pack
from tlm.model import ModelShape, Transformer, forward_flops, load_model, save_model

SHAPE = ModelShape(
    vocabulary=97, hidden=32, layers=3, heads=4, intermediate=40, max_length=64, num_labels=5, rope_theta=2000.0
)
LENGTHS = [9, 4, 17, 4, 1, 9, 30]


def built(shape=SHAPE, seed=0, residual_init="scaled") -> Transformer:
    """A model whose every weight differs from its start, norms and biases too, so that a swapped one shows."""
    model = Transformer(shape, torch.Generator().manual_seed(seed), residual_init)
    noise = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=noise)
    return model.eval()


def example(lengths=LENGTHS, shape=SHAPE, seed=0):
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(5, shape.vocabulary, n) for n in lengths]
    targets = [np.where(rng.random(n) < 0.4, rng.integers(5, shape.vocabulary, n), IGNORE) for n in lengths]
    return sequences, targets, rng.integers(0, shape.num_labels, len(lengths)).tolist()


def config(shape, **more):
    """Written by hand from the documentation of ModernBertConfig, apart from tlm.export."""
    return ModernBertConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=shape.intermediate, hidden_activation=shape.activation,
        norm_eps=shape.norm_eps, pad_token_id=shape.pad_id, layer_types=["full_attention"] * shape.layers,
        rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": shape.rope_theta}},
        classifier_pooling=shape.pooling, num_labels=shape.num_labels, **more,
    )  # fmt: skip


def twins(model):
    """The same weights in transformers' two models: a padded, independent implementation."""
    weights = model.state_dict()
    shared = {k: v for k, v in weights.items() if k.startswith("model.")}
    masked = ModernBertForMaskedLM(config(model.shape))
    missing = masked.load_state_dict(
        shared
        | {k.removeprefix("mlm_"): v for k, v in weights.items() if k.startswith(("mlm_head.", "decoder."))}
        | {"decoder.weight": weights["model.embeddings.tok_embeddings.weight"]}
    )
    assert not missing.missing_keys
    classifier = ModernBertForSequenceClassification(config(model.shape))
    classifier.load_state_dict(shared | {k: v for k, v in weights.items() if k.startswith(("head.", "classifier."))})
    dtype = next(model.parameters()).dtype
    return masked.eval().to(dtype), classifier.eval().to(dtype)


def padded(sequences, fill, extra=3):
    """[N, longest + extra], and its mask."""
    width = max(map(len, sequences)) + extra
    rows = torch.tensor([[*s.tolist(), *[fill] * (width - len(s))] for s in sequences])
    return rows, torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])


def losses(model, batch):
    hidden = model(batch)
    mlm = F.cross_entropy(model.mlm_logits(hidden[batch.masked]), batch.masked_tokens)
    return mlm, F.cross_entropy(model.classify(hidden, batch), batch.labels)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("activation", ["gelu", "silu", "relu2"])
def test_logits_and_gradients_equal_transformers_on_a_padded_batch(pooling, activation):
    model = built(replace(SHAPE, pooling=pooling, activation=activation))
    masked_twin, classifier_twin = twins(model)
    sequences, targets, labels = example()
    batch = pack(sequences, targets, labels)
    tokens, mask = padded(sequences, SHAPE.pad_id)
    wanted, _ = padded(targets, IGNORE)

    logits = model.classify(model(batch), batch)
    twin_logits = classifier_twin(input_ids=tokens, attention_mask=mask).logits
    torch.testing.assert_close(logits, twin_logits, atol=1e-5, rtol=0)
    every = pack(sequences, sequences)  # all positions, in packed order; the twin's are sorted alike
    order = np.argsort([len(s) for s in sequences], kind="stable")
    twin_mlm = masked_twin(input_ids=tokens, attention_mask=mask).logits
    flat = torch.cat([twin_mlm[i, : len(sequences[i])] for i in order])
    torch.testing.assert_close(model.mlm_logits(model(every)), flat, atol=1e-5, rtol=0)

    mlm, task = losses(model, batch)
    (mlm + task).backward()
    out = masked_twin(input_ids=tokens, attention_mask=mask, labels=wanted)
    out.loss.backward()
    F.cross_entropy(twin_logits, torch.tensor(labels)).backward()
    torch.testing.assert_close(mlm, out.loss, atol=1e-5, rtol=0)
    theirs = dict(classifier_twin.named_parameters())
    theirs |= {f"mlm_{k}": p for k, p in masked_twin.named_parameters() if k.startswith("head.")}
    theirs["decoder.bias"] = masked_twin.decoder.bias
    for name, parameter in model.named_parameters():
        twin_gradient = theirs[name].grad
        if name.startswith("model."):
            twin_gradient = twin_gradient + dict(masked_twin.named_parameters())[name].grad
        torch.testing.assert_close(parameter.grad, twin_gradient, atol=1e-5, rtol=1e-4, msg=name)


def decoder_twin(model):
    """The same weights in transformers' decoder, whose queries, keys and values are three matrices."""
    shape = model.shape
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
    twin = ModernBertDecoderForCausalLM(ModernBertDecoderConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=shape.intermediate, hidden_activation=shape.activation,
        norm_eps=shape.norm_eps, pad_token_id=shape.pad_id, layer_types=["full_attention"] * shape.layers,
        rope_parameters={"full_attention": rope},
    ))  # fmt: skip
    weights = {k.replace("mlm_head.", "lm_head."): v for k, v in model.state_dict().items()}
    weights["decoder.weight"] = weights["model.embeddings.tok_embeddings.weight"]
    for name in [name for name in weights if "Wqkv" in name]:
        for part, matrix in zip("qkv", weights.pop(name).chunk(3), strict=True):
            weights[name.replace("Wqkv", f"{part}_proj")] = matrix
    assert not twin.load_state_dict(weights, strict=False).missing_keys
    return twin.eval()


def test_next_token_losses_and_gradients_equal_transformers_decoder():
    model = built(replace(SHAPE, attention="causal"))
    twin, (sequences, _, _) = decoder_twin(model), example()
    batch = pack(sequences, [np.append(s[1:], IGNORE) for s in sequences])
    loss = model.mlm_loss_sum(model(batch)[batch.masked], batch.masked_tokens)
    loss.backward()
    tokens, mask = padded(sequences, SHAPE.pad_id)
    wanted, _ = padded(sequences, IGNORE)
    logits = twin(input_ids=tokens, attention_mask=mask).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten(), reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-3, rtol=1e-6)
    theirs = dict(twin.named_parameters())
    for name in ("mlm_head.dense.weight", "model.layers.1.mlp.Wi.weight", "model.embeddings.tok_embeddings.weight"):
        ours = model.get_parameter(name).grad
        torch.testing.assert_close(ours, theirs[name.replace("mlm_", "lm_")].grad, atol=2e-4, rtol=1e-4)
    ours = model.get_parameter("model.layers.2.attn.Wqkv.weight").grad.chunk(3)
    for part, gradient in zip("qkv", ours, strict=True):
        twin_gradient = theirs[f"model.layers.2.attn.{part}_proj.weight"].grad
        torch.testing.assert_close(gradient, twin_gradient, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ["prefix", "causal"])
def test_answers_side_by_side_are_what_each_is_alone(attention):
    """The prompt's states are computed once for all of them."""
    model, rng = built(replace(SHAPE, attention=attention)), np.random.default_rng(3)
    prompt, answers = rng.integers(5, 97, 11), [rng.integers(5, 97, n) for n in (3, 1, 6)]
    together = pack([np.concatenate([prompt, *answers])], answers=[(3, 1, 6)])
    states = model(together)[len(prompt) :].split([3, 1, 6])
    for answer, state in zip(answers, states, strict=True):
        alone = pack([np.concatenate([prompt, answer])], answers=[(len(answer),)])
        torch.testing.assert_close(model(alone)[len(prompt) :], state, atol=2e-5, rtol=1e-5)
        assert alone.attended == len(prompt) ** 2 + len(answer) * (len(prompt) + len(answer))


def test_a_prompt_is_read_both_ways_only_under_prefix():
    sequence = np.array([7, 8, 9, 10])
    changed = np.array([7, 8, 11, 10])
    for attention, sees in (("prefix", True), ("causal", False), ("bidirectional", True)):
        model = built(replace(SHAPE, attention=attention))
        states = [model(pack([s], answers=[(1,)]))[0] for s in (sequence, changed)]
        assert torch.equal(*states) != sees


def test_a_sequence_does_not_see_its_neighbours():
    model, (sequences, _, _) = built(), example()
    together = pack(sequences)
    logits = model.classify(model(together), together)
    for i, sequence in enumerate(sequences):
        alone = pack([sequence])
        torch.testing.assert_close(model.classify(model(alone), alone)[0], logits[i], atol=1e-5, rtol=0)


def test_gradients_of_both_losses_agree_with_finite_differences():
    shape = ModelShape(vocabulary=11, hidden=8, layers=2, heads=2, intermediate=6, max_length=8, num_labels=3)
    model = built(shape).double()
    batch = pack(*example([3, 2, 3, 1], shape))
    for which in (0, 1):
        model.zero_grad()
        losses(model, batch)[which].backward()
        rng = np.random.default_rng(which)
        for name, parameter in model.named_parameters():
            flat, step = parameter.data.view(-1), 1e-5
            for i in rng.choice(len(flat), min(3, len(flat)), replace=False):
                values = []
                for sign in (1, -1):
                    flat[i] += sign * step
                    with torch.no_grad():
                        values.append(losses(model, batch)[which].item())
                    flat[i] -= sign * step
                slope = (values[0] - values[1]) / (2 * step)
                analytic = 0.0 if parameter.grad is None else parameter.grad.view(-1)[i].item()
                assert analytic == pytest.approx(slope, abs=1e-7, rel=1e-5), (name, i)


def test_training_mode_drops_and_evaluation_does_not():
    model = built(replace(SHAPE, dropout=0.5))
    batch = pack(example()[0])
    assert torch.equal(model(batch), model(batch))
    assert torch.equal(model(batch), built()(batch))
    model.train()
    torch.manual_seed(0)
    first, second = model(batch), model(batch)
    torch.manual_seed(0)
    assert torch.equal(model(batch), first)
    assert not torch.equal(first, second)


def test_weights_are_a_function_of_the_generator_only():
    torch.manual_seed(1)
    first = Transformer(SHAPE, torch.Generator().manual_seed(3)).state_dict()
    torch.manual_seed(2)
    again = Transformer(SHAPE, torch.Generator().manual_seed(3)).state_dict()
    other = Transformer(SHAPE, torch.Generator().manual_seed(4)).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])
    embedding = first["model.embeddings.tok_embeddings.weight"]
    assert embedding.std().item() == pytest.approx(0.02 * 0.88, rel=0.05)  # a normal cut at 2 deviations has 0.88 of it
    assert embedding.abs().max() <= 0.04


def test_zero_residuals_make_a_bag_of_words():
    model = Transformer(SHAPE, torch.Generator().manual_seed(0), "zero")
    sequence = example([12])[0][0]
    forth, back = pack([sequence]), pack([sequence[::-1].copy()])
    torch.testing.assert_close(model.classify(model(forth), forth), model.classify(model(back), back))
    scaled = built()
    assert not torch.allclose(scaled.classify(scaled(forth), forth), scaled.classify(scaled(back), back), atol=1e-4)


def test_reset_head_changes_the_head_only():
    model = built()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.reset_head(2, torch.Generator().manual_seed(5))
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {k for k in after if after[k].shape != before[k].shape or not torch.equal(after[k], before[k])}
    assert changed == {"head.dense.weight", "head.norm.weight", "classifier.weight", "classifier.bias"}
    batch = pack(example()[0])
    assert model.classify(model(batch), batch).shape == (len(LENGTHS), 2)
    assert model.shape.num_labels == 2


def test_flops_equal_torchs_counter():
    model = built()
    batch = pack(*example())
    # Unfused attention, for the counter does not know the CPU's fused kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        losses(model, batch)
    masked = len(batch.masked)
    assert counter.get_total_flops() == forward_flops(SHAPE, LENGTHS, masked, classified=len(LENGTHS))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch)
    assert counter.get_total_flops() == forward_flops(SHAPE, LENGTHS)


@pytest.mark.parametrize(("key", "value"), [("heads", 3), ("pooling", "max"), ("activation", "tanh")])
def test_an_impossible_shape_is_a_clear_error(key, value):
    with pytest.raises(InputError, match=f"model.{key}"):
        replace(SHAPE, **{key: value})


def test_a_saved_model_comes_back_whole(tmp_path):
    model = built(replace(SHAPE, pooling="cls"))
    save_model(model, tmp_path / "m", labels=("a", "b", "c", "d", "é"))
    again = load_model(tmp_path / "m")
    assert again.shape == model.shape
    assert not again.training
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["model.json", "model.safetensors"]


def test_a_disk_that_refuses_leaves_the_model_that_was_there(tmp_path):
    first = built()
    save_model(first, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # model.json fits, the weights do not
    try:
        with pytest.raises(InputError, match=r"model\.safetensors: cannot be written .*make room"):
            save_model(built(seed=1), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.equal(load_model(tmp_path).classifier.weight, first.classifier.weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", None, "model.safetensors: no such file"),
        ("model.safetensors", lambda data: data[: len(data) // 2], "model.safetensors: truncated or damaged"),
        ("model.safetensors", lambda data: data[:5], "model.safetensors: truncated or damaged"),
        ("model.safetensors", lambda data: b"", "model.safetensors: truncated or damaged"),
        ("model.json", None, "model.json: no such file"),
        ("model.json", lambda data: data[:40], "model.json: damaged"),
        ("model.json", lambda data: b"[]", "model.json: does not describe a model"),
        ("model.json", lambda data: data.replace(b'"hidden"', b'"hiden"'), "model.json: does not describe a model"),
        ("model.json", lambda data: data.replace(b'"hidden": 32', b'"hidden": 40'), "does not fit model.json"),
        ("model.json", lambda data: data.replace(b'"layers": 3', b'"layers": 2'), r"does not fit .*layers\.2"),
    ],
)
def test_a_damaged_model_is_one_clear_sentence(tmp_path, name, content, message):
    save_model(built(), tmp_path)
    path = tmp_path / name
    data = path.read_bytes()
    path.unlink()
    if content:
        assert content(data) != data
        path.write_bytes(content(data))
    with pytest.raises(InputError, match=message):
        load_model(tmp_path)


def test_the_start_of_each_kind_of_matrix():
    shape = replace(SHAPE, hidden=64, intermediate=96)
    for residual_init, scale in (("zero", 0.0), ("scaled", 6**-0.5)):  # 1 / sqrt(2 x 3 layers)
        weights = Transformer(shape, torch.Generator().manual_seed(0), residual_init).state_dict()
        assert torch.equal(weights["mlm_head.dense.weight"], torch.eye(64))
        for name, inputs, wanted in (
            ("attn.Wqkv", 64, 1.0), ("mlp.Wi", 64, 1.0), ("attn.Wo", 64, scale), ("mlp.Wo", 96, scale),
        ):  # fmt: skip
            std = weights[f"model.layers.1.{name}.weight"].std().item()
            assert std == pytest.approx(0.88 * wanted * inputs**-0.5, rel=0.05), name
        assert all((w == float("norm" in name)).all() for name, w in weights.items() if w.ndim == 1)
