"""The classifier as an ONNX graph over padded batches, as other programs have them, and its int8 twin."""

import logging
import warnings
from pathlib import Path

import torch
from torch import nn

from tasks.errors import InputError
from tlm.attention import angles
from tlm.model import Transformer

NAMES = ("input_ids", "attention_mask")


class Padded(nn.Module):
    """int64 [N, L] tokens and mask -> logits [N, C]: what `Transformer` computes of packed texts, by its modules."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        encoder, shape = self.model.model, self.model.shape
        hidden = encoder.embeddings(input_ids)  # [N, L, D]
        positions = torch.arange(input_ids.shape[1])
        cos, sin = angles(positions, shape.hidden // shape.heads, shape.rope_theta, hidden.dtype)  # [L, 1, D / 2]
        unseen = (1.0 - attention_mask[:, None, None, :].to(hidden.dtype)) * -1e9
        for layer in encoder.layers:
            qkv = layer.attn.Wqkv(layer.attn_norm(hidden)).unflatten(-1, (3, shape.heads, -1))  # [N, L, 3, H, D]
            query, key, value = qkv.unbind(2)
            query, key, value = (x.transpose(1, 2) for x in (turned(query, cos, sin), turned(key, cos, sin), value))
            scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + unseen
            mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
            hidden = hidden + layer.attn.Wo(mixed)
            hidden = hidden + layer.mlp(hidden, layer.mlp_norm)
        hidden = encoder.final_norm(hidden)
        if shape.pooling == "mean":
            real = attention_mask[:, :, None].to(hidden.dtype)
            pooled = (hidden * real).sum(1) / real.sum(1)
        else:
            pooled = hidden[:, 0]
        return self.model.classifier(self.model.head(pooled))


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def write(model: Transformer, path: Path) -> None:
    """The float32 graph, for any number and length of texts. Raises InputError where onnx is missing."""
    try:
        import onnx  # noqa: F401
    except ImportError:
        raise InputError("quant=onnx-int8: onnx is missing; pip install 'tlm[onnx]'") from None
    model.eval()
    example = torch.ones(2, 5, dtype=torch.int64)
    axes = {name: {0: "texts", 1: "tokens"} for name in NAMES} | {"logits": {0: "texts"}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Padded(model), (example, example), str(path), input_names=list(NAMES), output_names=["logits"],
            dynamic_axes=axes, opset_version=17, dynamo=False,
        )  # fmt: skip


def to_int8(path: Path) -> None:
    """The layers' products in int8, by ONNX Runtime's dynamic quantisation, in place: weights with a scale for each
    output, inputs with one for all. Raises InputError where it is missing."""
    try:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError:
        raise InputError("quant=onnx-int8: onnxruntime is missing; pip install 'tlm[onnx]'") from None
    graph = onnx.load(path)
    heads = [node.name for node in graph.graph.node if node.name.startswith(("/head/", "/classifier/"))]
    heads += [f"{name}_MatMul" for name in heads]  # what a product with a bias is turned into first
    logging.getLogger().setLevel(logging.ERROR)  # advises a preparation that would change nothing here
    quantize_dynamic(
        graph, path, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8, per_channel=True,
        nodes_to_exclude=heads,
    )  # fmt: skip
