"""A trained model as inference on a CPU reads it: the layers' matrices packed for the kernels, also as a file."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from tasks.errors import InputError
from tlm.config import BASES
from tlm.lowbit.adapters import merge
from tlm.lowbit.conversion import SMALLEST, Conversion, adapt, outside_layers
from tlm.lowbit.cpu.packed import Packed, linear, pack
from tlm.lowbit.recipes import RECIPES
from tlm.model import GatedMLP, ModelShape, Transformer, load_model, write_tensors
from tlm.run import read_json

BITS = {"int8": 8, "ternary": 2, "binary": 1}
FILE, VERSION = "packed.safetensors", "1"
# Weights of a matrix, below which 8 bits save no time (`tlm bench kernels`): with 3,072 not even for 512 rows, with
# 49,152 from 32 rows on.
WORTHWHILE = 4096


class PackedLinear(nn.Module):
    """`odd` counts rows of zeros, and rows with a NaN or infinity, which come out as NaN."""

    def __init__(self, packed: Packed, activation: str = "none"):
        super().__init__()
        self.packed, self.activation = packed, activation
        self.odd: Counter[str] = Counter()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [..., K] -> [..., O]."""
        out = linear(x.reshape(-1, x.shape[-1]), self.packed, self.activation, self.odd)
        return out.view(*x.shape[:-1], -1)


def own_precision(shape: ModelShape) -> str:
    """What a trained model can be packed as."""
    return shape.recipe if shape.recipe and RECIPES[shape.recipe].in_the_weights else "int8"


def pack_model(model: Transformer, precision: str) -> Conversion:
    """Pack the layers' matrices in place, for inference alone: as int8 what was trained in 8 bits and more, as ternary
    and binary what was trained so. Raises InputError for anything else."""
    recipe, own = model.shape.recipe, own_precision(model.shape)
    if precision not in BITS:
        raise InputError(
            f"precision={precision}: is not for inference on a CPU; use one of {', '.join((*BITS, *BASES))}"
        )
    if precision != own:
        trained = f"by precision={recipe}" if recipe else "in fp32"
        raise InputError(f"precision={precision}: the model was trained {trained}; set precision={own}")
    converted, left = [], {}
    for name, module in list(model.named_modules()):
        if not list(module.parameters(recurse=False)):
            continue
        if reason := why_left(name, module, precision):
            left[name] = reason
            continue
        gated = name.endswith(".Wi") and is_gelu(model.get_submodule(name.rpartition(".")[0]))
        packed = pack(RECIPES[precision].weight(module.weight.detach()), BITS[precision], module.bias, 1 + gated)
        place(model, name, packed, "geglu" if gated else "none")
        converted.append(name)
    return Conversion(f"{precision}, packed", tuple(converted), left)


def open_packed(folder: Path, precision: str | None) -> Transformer:
    """The model of a folder that holds a packed one, or one whose layers are made so small now, adapters merged before.
    Raises InputError."""
    if not (folder / FILE).exists():
        model = load_model(folder)
        merge(model)
        if precision not in BASES:
            pack_model(model, precision)
        elif model.shape.recipe in RECIPES and RECIPES[model.shape.recipe].in_the_weights:
            raise InputError(
                f"precision={precision}: the model was trained by precision={model.shape.recipe}; set that"
            )
        else:
            adapt(model, precision, rank=0)
        return model
    model = load_packed(folder)
    (bits,) = {module.packed.bits for module in model.modules() if isinstance(module, PackedLinear)}
    if precision not in (None, *(name for name, of in BITS.items() if of == bits)):
        raise InputError(f"precision={precision}: {folder / FILE} holds {bits} bits a weight; leave the key out")
    return model


def why_left(name: str, module: nn.Module, precision: str) -> str | None:
    if not isinstance(module, nn.Linear):
        return "no nn.Linear"
    if min(module.weight.shape) < SMALLEST:
        return f"a side below {SMALLEST}"
    if precision == "int8" and module.weight.numel() < WORTHWHILE:
        return f"fewer than {WORTHWHILE:,} weights save no time"
    return outside_layers(name, module)


def is_gelu(module: nn.Module) -> bool:
    return isinstance(module, GatedMLP) and module.act is nn.functional.gelu


class Fused(nn.Module):
    """A GatedMLP whose first product gives the gated values at once."""

    def __init__(self, Wi: nn.Module, Wo: nn.Module):
        super().__init__()
        self.Wi, self.Wo = Wi, Wo

    def forward(self, hidden: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        return self.Wo(self.Wi(norm(hidden)))


def place(model: nn.Module, name: str, packed: Packed, activation: str) -> None:
    model.set_submodule(name, PackedLinear(packed, activation))
    if activation == "geglu":
        owner = name.rpartition(".")[0]
        mlp = model.get_submodule(owner)
        model.set_submodule(owner, Fused(mlp.Wi, mlp.Wo))


# --- as a file ------------------------------------------------------------------------------------------------------

TENSORS = ("panels", "scales", "bias")


def save_packed(model: Transformer, folder: Path) -> None:
    """packed.safetensors: what was packed, and all else in fp32; its head holds the version and a checksum."""
    tensors, packed = dict(model.state_dict()), {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            held = {part: getattr(module.packed, part) for part in TENSORS}
            tensors |= {f"{name}.{part}": t for part, t in held.items() if t is not None}
            sizes = {k: v for k, v in asdict(module.packed).items() if k not in TENSORS}
            packed[name] = sizes | {"activation": module.activation}
    described = json.dumps(packed, sort_keys=True)
    head = {"version": VERSION, "packed": described, "sha256": checksum(tensors, described)}
    write_tensors(folder / FILE, tensors, head)


def load_packed(folder: Path) -> Transformer:
    """Raises InputError if a file is missing, damaged or of another version."""
    path = folder / FILE
    try:
        with safe_open(path, "pt") as file:
            head = file.metadata() or {}
            if head.get("version") != VERSION:
                raise InputError(
                    f"{path}: of version {head.get('version')}, and this program reads {VERSION}; export it again"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({error}); export it again") from None
    if checksum(tensors, head.get("packed", "")) != head.get("sha256"):
        raise InputError(f"{path}: damaged (its checksum is another); copy or export it again")
    model = Transformer(ModelShape(**read_json(folder / "model.json")["shape"]), generator=None)
    for name, sizes in json.loads(head["packed"]).items():
        activation = sizes.pop("activation")
        parts = {part: tensors.pop(f"{name}.{part}", None) for part in TENSORS}
        place(model, name, Packed(**parts, **sizes), activation)
    model.load_state_dict(tensors)
    return model.eval()


def checksum(tensors: Mapping[str, torch.Tensor], described: str) -> str:
    total = hashlib.sha256(described.encode())
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        total.update(json.dumps([name, str(t.dtype), list(t.shape)]).encode())
        total.update(memoryview(t.view(-1).view(torch.uint8).numpy()) if t.numel() else b"")
    return total.hexdigest()
