"""What differs on a GPU, as far as a machine without one can tell: where tensors lie, how flash attention is asked.

The device `meta` stands for a GPU: like one, it refuses to compute with tensors that lie on the CPU.
"""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tasks.errors import InputError
from tlm import attention
from tlm.batches import IGNORE, pack
from tlm.engine import device_of
from tlm.model import ModelShape, Transformer, compile_layers
from tlm.objectives import Losses
from tlm.optimizers import build_optimizer

SHAPE = ModelShape(300, 64, 3, 4, 96, 32, 3, dropout=0.1)


def losses():
    return Losses(Transformer(SHAPE, torch.Generator().manual_seed(0), residual_init="scaled"))


def some_batch(lengths=(9, 4, 7, 7, 12)):
    rng = np.random.default_rng(0)
    texts = [rng.integers(5, 300, n) for n in lengths]
    return pack(
        texts, [np.where(rng.random(len(t)) < 0.3, t, IGNORE) for t in texts], [i % 3 for i in range(len(texts))]
    )


def gradients(module, batch):
    """Both losses, and the gradient of each parameter."""
    torch.manual_seed(0)
    both = module(batch, True, True)
    sum(both).backward()
    return [loss.detach() for loss in both], {name: p.grad for name, p in module.named_parameters()}


def assert_same(a, b, within):
    for one, other in zip([*a[0], *a[1].values()], [*b[0], *b[1].values()], strict=True):
        torch.testing.assert_close(one, other, rtol=within, atol=within)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_stays_on_its_device(optimizer):
    module = losses().to("meta")
    found, grads = gradients(module, some_batch().to("meta"))
    stepping = build_optimizer(module, optimizer, 0.01)
    stepping.step()
    state = [tensor for of in stepping.state.values() for tensor in of.values()]
    assert {tensor.device.type for tensor in [*found, *grads.values(), *state]} == {"meta"}
    with pytest.raises(RuntimeError):
        module(some_batch(), True, True)  # else the test above shows nothing


def by_sequence(query, key, value, borders, key_borders, longest, longest_key):
    """What `torch.nn.attention.varlen.varlen_attn` promises, a sequence at a time."""
    assert borders.dtype == key_borders.dtype == torch.int32
    assert longest == longest_key == int(borders.diff().max())
    out = []
    for a, b in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        one = (x[a:b].transpose(0, 1) for x in (query, key, value))
        out.append(F.scaled_dot_product_attention(*one).transpose(0, 1))
    return torch.cat(out)


def test_flash_attention_is_asked_for_what_the_loop_over_groups_does(monkeypatch):
    module, batch = losses(), some_batch()
    plain = gradients(module, batch)
    module.zero_grad()
    calls = []
    monkeypatch.setattr(attention, "flash_takes", lambda qkv: True)
    monkeypatch.setattr(
        "torch.nn.attention.varlen.varlen_attn", lambda *arguments: calls.append(1) or by_sequence(*arguments)
    )
    assert_same(plain, gradients(module, batch), 1e-5)
    assert len(calls) == SHAPE.layers


def test_flash_attention_is_not_asked_on_a_cpu_or_in_fp32():
    assert not attention.flash_takes(torch.zeros(2, 3, 4, 16, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_checkpointing_changes_memory_alone(dtype):
    def kept(module, batch):
        """Bytes that the forward pass keeps for the backward pass, beside the weights, and what comes of both."""
        own, seen = {p.untyped_storage().data_ptr() for p in module.parameters()}, {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes(), tensor
            return tensor

        with (
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            torch.manual_seed(0)
            hidden = module.model(batch).sum()
        size = sum(nbytes for nbytes, _ in seen.values())
        hidden.backward()
        result = [hidden.detach()], {name: p.grad for name, p in module.model.model.named_parameters()}
        return size, result

    module, batch = losses(), some_batch((20,) * 16)
    whole, plain = kept(module, batch)
    module.zero_grad()
    module.model.model.checkpointing = True
    less, again = kept(module, batch)
    assert_same(plain, again, 0.0)  # dropout too draws what it drew
    assert less < whole / 3


def test_compiled_layers_compute_the_same(monkeypatch):
    """By the graphs that torch.compile traces, for any number of tokens; what its C++ compiler makes of them takes a
    minute and is torch's own to test."""
    traced = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: traced(f, **options, backend="aot_eager"))
    module = losses().eval()
    batches = [some_batch(), some_batch((3, 30, 17)), some_batch((5, 5))]
    plain = [gradients(module, batch) for batch in batches]
    module.zero_grad()
    compile_layers(module.model, torch.device("cpu"))
    torch._dynamo.utils.counters.clear()
    assert_same(plain[-1], [gradients(module, batch) for batch in batches][-1], 1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 2 * SHAPE.layers  # none for each batch anew


def test_without_a_compiler_compile_is_refused(monkeypatch):
    def broken(function):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(InputError, match="compile=true: .*No working C\\+\\+ compiler.*set compile=false"):
        compile_layers(losses().model, torch.device("cpu"))


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto") == device_of("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="device=cuda"):
        device_of("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_of("auto") == device_of("cuda") == torch.device("cuda", 1)
    assert device_of("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="more processes than the 2 GPUs"):
        device_of("auto")
