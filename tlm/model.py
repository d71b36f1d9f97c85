"""One Transformer in ModernBERT's layout, trained from scratch on two heads: masked tokens and one label a sequence.

Parameter names are those of `transformers`, so that export is a copy of tensors. It trades generality for speed on a
CPU: full attention only, no padding (see batches.py), the MLM head at masked positions only. Legend of shape suffixes:
T tokens of a batch, N sequences, M masked positions, C labels, V vocabulary.

Layout: Warner et al. 2024 (arXiv 2412.13663) with every layer on full attention: pre-norm without biases, a norm after
the embedding and hence none before the first attention, RoPE (Su et al. 2021), GeGLU (Shazeer 2020), a tied decoder.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from tasks.errors import InputError
from tlm.attention import angles, attend
from tlm.batches import Batch
from tlm.cross_entropy import linear_cross_entropy_sum
from tlm.lowbit import after_norm, convert, takes_in
from tlm.precision import rounded_up
from tlm.run import read_json, write_json

ATTENTIONS = ("bidirectional", "prefix", "causal")
ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "relu2": lambda x: F.relu(x).square()}  # names as in transformers
EMBEDDING_STD = 0.02  # a norm follows, so it decides only how fast rows turn


@dataclass(frozen=True)
class ModelShape:
    """What fixes the tensors and the function they compute; saved beside the weights."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    max_length: int
    num_labels: int
    pooling: str = "mean"  # mean over all tokens of a sequence, or its first: cls
    activation: str = "gelu"  # of the gated MLP; the heads always use gelu
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    dropout: float = 0.0  # after the embedding, inside the MLP and after attention
    pad_id: int = 0
    unk_id: int = 1
    cls_id: int = 2
    sep_id: int = 3
    mask_id: int = 4
    recipe: str | None = None  # of tlm/lowbit, that the layers' products follow
    rank: int = 0  # of adapters beside an encoder that is frozen by the recipe
    soft: int = 0  # vectors beyond the vocabulary, that only inputs name: prompts that are trained
    attention: str = "bidirectional"  # prefix: that in a prompt, and causal in the answers after it; or all causal

    def __post_init__(self) -> None:
        if self.hidden % (2 * self.heads):
            raise InputError(f"model.hidden={self.hidden} must be a multiple of twice model.heads={self.heads}")
        if self.pooling not in ("mean", "cls"):
            raise InputError(f"model.pooling={self.pooling!r} must be mean or cls")
        if self.attention not in ATTENTIONS:
            raise InputError(f"model.attention={self.attention!r} must be one of {', '.join(ATTENTIONS)}")
        if self.activation not in ACTIVATIONS:
            raise InputError(f"model.activation={self.activation!r} must be one of {', '.join(ACTIVATIONS)}")


class Norm(nn.Module):
    """LayerNorm without bias."""

    def __init__(self, shape: ModelShape):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.hidden))
        self.eps = shape.norm_eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(hidden, self.weight.shape, self.weight, None, self.eps)


def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias)


class Embeddings(nn.Module):
    def __init__(self, shape: ModelShape):
        super().__init__()
        self.tok_embeddings = nn.Embedding(shape.vocabulary, shape.hidden)
        if shape.soft:
            self.soft = nn.Embedding(shape.soft, shape.hidden)
        self.norm = Norm(shape)
        self.drop = nn.Dropout(shape.dropout)
        self.shape = shape

    def forward(self, tokens_T: torch.Tensor) -> torch.Tensor:
        """Ids from the vocabulary's size on are those of `soft`."""
        if not self.shape.soft:
            return self.drop(self.norm(self.tok_embeddings(tokens_T)))
        at = (tokens_T >= self.shape.vocabulary).nonzero().flatten()
        words_TD = self.tok_embeddings(tokens_T.index_fill(0, at, self.shape.pad_id))
        return self.drop(self.norm(words_TD.index_copy(0, at, self.soft(tokens_T[at] - self.shape.vocabulary))))


class Attention(nn.Module):
    def __init__(self, shape: ModelShape):
        super().__init__()
        self.heads = shape.heads
        self.attend = attend
        self.Wqkv = linear(shape.hidden, 3 * shape.hidden)
        self.Wo = linear(shape.hidden, shape.hidden)
        self.out_drop = nn.Dropout(shape.dropout)

    def forward(
        self, hidden_TD: torch.Tensor, norm: nn.Module, batch: Batch, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        qkv = after_norm(norm, self.Wqkv, hidden_TD).unflatten(-1, (3, self.heads, -1))
        return self.out_drop(self.Wo(self.attend(qkv, batch, cos, sin)))


class GatedMLP(nn.Module):
    def __init__(self, shape: ModelShape):
        super().__init__()
        self.Wi = linear(shape.hidden, 2 * shape.intermediate)
        self.act = ACTIVATIONS[shape.activation]
        self.drop = nn.Dropout(shape.dropout)
        self.Wo = linear(shape.intermediate, shape.hidden)

    def forward(self, hidden: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        both = after_norm(norm, self.Wi, hidden)
        if self.act is F.gelu and not (self.training and self.drop.p) and takes_in(self.Wo, both.device):
            return self.Wo(both, "geglu")
        value, gate = both.chunk(2, dim=-1)
        return self.Wo(self.drop(self.act(value) * gate))


class Layer(nn.Module):
    def __init__(self, shape: ModelShape, first: bool):
        super().__init__()
        self.attn_norm = nn.Identity() if first else Norm(shape)  # the embedding has just been normed
        self.attn = Attention(shape)
        self.mlp_norm = Norm(shape)
        self.mlp = GatedMLP(shape)

    def forward(self, hidden_TD: torch.Tensor, batch: Batch, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        hidden_TD = hidden_TD + self.attn(hidden_TD, self.attn_norm, batch, cos, sin)
        return hidden_TD + self.mlp(hidden_TD, self.mlp_norm)


class Encoder(nn.Module):
    def __init__(self, shape: ModelShape):
        super().__init__()
        self.shape = shape
        self.embeddings = Embeddings(shape)
        self.layers = nn.ModuleList(Layer(shape, first=i == 0) for i in range(shape.layers))
        self.final_norm = Norm(shape)
        self.checkpointing = False  # whether layers keep their input alone and are computed again in the backward pass

    def forward(self, batch: Batch) -> torch.Tensor:
        real = len(batch.tokens)
        batch = batch.under(self.shape.attention).filled(rounded_up(real))
        hidden_TD = self.embeddings(batch.tokens)
        head_dim = self.shape.hidden // self.shape.heads
        cos, sin = angles(batch.positions, head_dim, self.shape.rope_theta, hidden_TD.dtype)
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                hidden_TD = checkpoint(layer, hidden_TD, batch, cos, sin, use_reentrant=False)
            else:
                hidden_TD = layer(hidden_TD, batch, cos, sin)
        return self.final_norm(hidden_TD[:real])


class Head(nn.Module):
    def __init__(self, shape: ModelShape):
        super().__init__()
        self.dense = linear(shape.hidden, shape.hidden)
        self.norm = Norm(shape)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(F.gelu(self.dense(hidden)))


class Decoder(nn.Module):
    """The MLM output layer: the token embeddings are its weight, so it owns a bias only."""

    def __init__(self, shape: ModelShape):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(shape.vocabulary))

    def forward(
        self, hidden_MD: torch.Tensor, embeddings_VD: torch.Tensor, targets_M: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [M, V]; or, without ever holding them, the sum of their cross-entropies with targets."""
        if targets_M is None:
            return F.linear(hidden_MD, embeddings_VD, self.bias)
        return linear_cross_entropy_sum(hidden_MD, embeddings_VD, self.bias, targets_M)


class Transformer(nn.Module):
    """The encoder with both heads. Weights are a pure function of (shape, generator's state, residual_init).

    Matrices are normal, cut at two deviations, of variance 1 / inputs. What a layer adds to the stream (attn.Wo and
    mlp.Wo) starts at `zero`, so that every layer begins as the identity and a warm-started embedding is already a bag
    of words; or `scaled` by 1 / sqrt(2 layers) (GPT-2, ModernBERT). The MLM head's matrix is the identity, for the
    decoder behind it speaks the embeddings' language. Masked-LM loss on unseen text against ModernBERT's std of 0.02
    everywhere (hidden 128, warm-started embeddings, Muon, 1,024 tokens a step, two seeds): 6.80 and 6.75 against 7.03
    and 7.02 after 200 steps (6.86 and 6.84 with scaled residuals), 5.78 and 5.83 against 6.19 and 6.23 after 700.

    Without a generator the weights are left undrawn, for someone to fill.
    """

    def __init__(self, shape: ModelShape, generator: torch.Generator | None, residual_init: str = "zero"):
        super().__init__()
        assert residual_init in ("zero", "scaled"), residual_init
        self.shape = shape
        with torch.device("meta"):  # torch would draw from its global generator only for us to draw again
            self.model = Encoder(shape)
            self.mlm_head = Head(shape)
            self.decoder = Decoder(shape)
            self.head = Head(shape)
            self.classifier = linear(shape.hidden, shape.num_labels, bias=True)
        residual_scale = 0.0 if residual_init == "zero" else 1 / math.sqrt(2 * shape.layers)
        if generator is None:
            self.to_empty(device="cpu")
        else:
            draw(self, generator, residual_scale)
        self.conversion = convert(self, shape.recipe, rank=shape.rank) if shape.recipe else None

    def forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states [T, hidden] in the batch's packed order, after the last norm."""
        return self.model(batch)

    def mlm_logits(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        """Logits [M, V] of the rows given: `hidden[batch.masked]`, as over all tokens it costs more than the rest."""
        hidden_MD = F.pad(hidden_MD, (0, 0, 0, rounded_up(len(hidden_MD)) - len(hidden_MD)))
        return self.decoder(self.mlm_head(hidden_MD), self.model.embeddings.tok_embeddings.weight)

    def mlm_loss_sum(self, hidden_MD: torch.Tensor, targets_M: torch.Tensor) -> torch.Tensor:
        """Sum of the cross-entropies of `mlm_logits` with the tokens that should stand there."""
        return self.decoder(self.mlm_head(hidden_MD), self.model.embeddings.tok_embeddings.weight, targets_M)

    def classify(self, hidden_TD: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Logits [N, C], a row for each of the caller's sequences in the caller's order."""
        return self.classifier(self.head(self.pooled(hidden_TD, batch)))

    def pooled(self, hidden_TD: torch.Tensor, batch: Batch) -> torch.Tensor:
        """States [N, hidden] of the caller's sequences, in the caller's order."""
        mean = self.shape.pooling == "mean"
        pooled = torch.cat([part.mean(1) if mean else part[:, 0] for part in batch.split(hidden_TD)])
        return pooled[batch.slots]

    def reset_head(self, num_labels: int, generator: torch.Generator) -> None:
        """A fresh classification head, as the second stage wants. Its parameters are new: build the optimizer anew."""
        self.shape = replace(self.shape, num_labels=num_labels)
        like = self.decoder.bias
        with torch.device("meta"):
            self.head, self.classifier = Head(self.shape), linear(self.shape.hidden, num_labels, bias=True)
        for module in (self.head, self.classifier):
            draw(module.to(like.dtype), generator, device=like.device)


def draw(module: nn.Module, generator: torch.Generator, residual_scale: float = 1.0, device="cpu") -> None:
    """Give `module` memory and fresh weights, in the order of its parameters' names in the code."""
    module.to_empty(device=device)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim == 1:
                weight.fill_(float("norm" in name))
            elif name == "mlm_head.dense.weight":
                nn.init.eye_(weight)
            else:
                std = EMBEDDING_STD if ".embeddings." in f".{name}" else 1 / math.sqrt(weight.shape[1])
                fresh = torch.empty(weight.shape)
                nn.init.trunc_normal_(fresh, std=std, a=-2 * std, b=2 * std, generator=generator)
                weight.copy_(fresh * residual_scale if name.endswith((".attn.Wo.weight", ".mlp.Wo.weight")) else fresh)


def compile_layers(model: Transformer, device: torch.device) -> None:
    """torch.compile of each layer, for any number of tokens; attention's groups, new in each batch, stay as they are.

    Raises InputError where nothing can be compiled.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # a missing compiler is told in many ways
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"compile=true: torch.compile does not work here ({reason}); set compile=false") from None
    for layer in model.model.layers:
        layer.attn.attend = torch.compiler.disable(layer.attn.attend)
        layer.compile(dynamic=True)


def forward_flops(
    shape: ModelShape, lengths: Sequence[int], masked: int = 0, classified: int = 0, attended: int | None = None
) -> int:
    """Floating-point operations of the matrix products of one forward pass (2mnk each); backward takes twice that.

    `lengths` are the sequences' tokens, `masked` the positions the MLM head sees, `classified` the sequences the
    classification head sees, `attended` the pairs of tokens that attention scores (Batch.attended; all of a sequence if
    None). Norms, activations and softmax are left out, as is usual.
    """
    hidden = shape.hidden
    per_token = 2 * layer_weights(shape) + 2 * shape.rank * (8 * hidden + 3 * shape.intermediate)
    attention = 4 * hidden * (sum(length * length for length in lengths) if attended is None else attended)
    layers = shape.layers * (per_token * sum(lengths) + attention)
    mlm_head = 2 * masked * hidden * (hidden + shape.vocabulary)
    return layers + mlm_head + 2 * classified * hidden * (hidden + shape.num_labels)


def layer_weights(shape: ModelShape) -> int:
    """Of its four matrices."""
    return shape.hidden * (4 * shape.hidden + 3 * shape.intermediate)


def training_flops(
    shape: ModelShape, lengths: Sequence[int], masked: int = 0, classified: int = 0, attended: int | None = None
) -> int:
    """Of forward and backward: three times the forward pass, less the gradients of weights that are frozen."""
    whole = 3 * forward_flops(shape, lengths, masked, classified, attended)
    if not shape.rank:
        return whole
    return whole - 2 * (shape.layers * layer_weights(shape) * sum(lengths) + masked * shape.hidden * shape.vocabulary)


def save_model(model: Transformer, folder: Path, labels: Sequence[str] = ()) -> None:
    """Write model.json (shape and label names) and model.safetensors, each atomically, the weights last.

    Saved again into the same folder, weights of the same shape replace the old ones in one rename, so that a kill at
    any moment leaves a whole model. Raises InputError where the disk refuses.
    """
    write_json(folder / "model.json", {"shape": asdict(model.shape), "labels": list(labels)})
    write_tensors(folder / "model.safetensors", model.state_dict())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], head: Mapping[str, str] | None = None) -> None:
    """A safetensors file, atomically, with `head` among its metadata."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, {"format": "pt", **(head or {})})
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error}); make room or name another folder") from None


def load_model(folder: Path) -> Transformer:
    """The model that `save_model` wrote, in evaluation mode. Raises InputError if a file is missing, cut or misfits."""
    described, path = folder / "model.json", folder / "model.safetensors"
    try:
        shape = ModelShape(**read_json(described)["shape"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{described}: does not describe a model ({error}); restore it or train again") from None
    model = Transformer(shape, generator=None)
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the folder holds no whole model, train again") from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: truncated or damaged ({error}); restore it or train again") from None
    sizes, wanted = ({k: tuple(t.shape) for k, t in x.items()} for x in (tensors, model.state_dict()))
    if wrong := [name for name in sizes | wanted if sizes.get(name) != wanted.get(name)]:
        raise InputError(f"{path}: does not fit model.json beside it ({wrong[0]}); restore both or train again")
    model.load_state_dict(tensors)
    return model.eval()
