"""One call that makes a model train by a recipe, and tells what it changed and what it left."""

import importlib.util
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tasks.errors import InputError
from tlm.config import BASES, TrainConfig
from tlm.lowbit.adapters import BLOCK, Adapted, adapters, bitsandbytes, trains
from tlm.lowbit.linear import Linear
from tlm.lowbit.recipes import RECIPES

ON_GPU = ("fp8-tensorwise", "fp8-rowwise", "fp8-blockwise")
FP8_SINCE = (8, 9)  # compute capability
SMALLEST = 32  # inputs or outputs: one block of mxfp8. Below it scales weigh as much as what they save
Leave = Callable[[str, nn.Linear], str | None]  # name and module -> why it stays as it is, or None


@dataclass(frozen=True)
class Conversion:
    """Names of modules with weights: the converted ones, and those left with the reason."""

    recipe: str
    converted: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        reasons = Counter(self.left.values())
        left = "; ".join(f"{number} left ({reason})" for reason, number in reasons.items())
        return f"{self.recipe}: {len(self.converted)} matrices converted; {left}"


def outside_layers(name: str, linear: nn.Linear) -> str | None:
    """The layers hold the cost; heads decide the answer by small numbers."""
    return None if ".layers." in f".{name}" else "a head"


def convert(model: nn.Module, recipe: str, leave: Leave = outside_layers, rank: int = 0) -> Conversion:
    """Put a lowbit.Linear in the place of every nn.Linear that is not left; parameters stay the same objects, under the
    same names. For a frozen base an empty Adapted, with adapters of `rank`; the rest of the encoder is frozen, too.
    Raises InputError for an unknown recipe, or where nothing would be converted."""
    if recipe not in (*RECIPES, *BASES):
        raise InputError(f"precision={recipe}: no such recipe; use one of {', '.join((*RECIPES, *BASES))}")
    converted, left = [], {}
    for name, module in list(model.named_modules()):
        if not list(module.parameters(recurse=False)):
            continue
        if reason := why_left(name, module, leave) or (recipe in BASES and cut(module)):
            left[name] = reason
        else:
            model.set_submodule(name, lowbit(module, recipe) if recipe in RECIPES else frozen(module, recipe, rank))
            converted.append(name)
    if not converted:
        raise InputError(
            f"precision={recipe}: no matrix of the layers has {SMALLEST} inputs and outputs or more, so that nothing "
            "would change; set precision=fp32 or choose a larger model"
        )
    if recipe in BASES:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trains(name))
    return Conversion(recipe, tuple(converted), left)


def why_left(name: str, module: nn.Module, leave: Leave) -> str | None:
    if type(module) is not nn.Linear:
        return "no nn.Linear"
    if module.weight.dtype != torch.float32:
        return "not in float32"
    if min(module.weight.shape) < SMALLEST:
        return f"a side below {SMALLEST}"
    return leave(name, module)


def lowbit(linear: nn.Linear, recipe: str) -> Linear:
    with torch.device("meta"):  # its own weights are never drawn
        result = Linear(linear.in_features, linear.out_features, linear.bias is not None, recipe)
    result.weight, result.bias = linear.weight, linear.bias
    return result.train(linear.training)


def cut(linear: nn.Linear) -> str | None:
    return f"no multiple of {BLOCK} weights" if linear.weight.numel() % BLOCK else None


def frozen(linear: nn.Linear, base: str, rank: int) -> Adapted:
    assert linear.bias is None  # the layers' have none
    return Adapted(linear.in_features, linear.out_features, base, rank).train(linear.training)


def adapt(model: nn.Module, base: str, rank: int, generator: torch.Generator | None = None) -> Conversion:
    """Freeze a Transformer's encoder, its matrices as `base`, and draw adapters, if `rank` is not 0. In place."""
    weights = model.state_dict()
    model.conversion = convert(model, base, rank=rank)
    for name, module in adapters(model).items():
        module.freeze(weights[f"{name}.weight"], generator)
    model.shape = replace(model.shape, recipe=base, rank=rank)
    return model.conversion


def weights_as_read(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict for a reader without recipes: matrices that mean nothing unrounded are as the products read them.

    Left out is the rounding of inputs, and of weights that were only trained by way of rounded ones.
    """
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, Linear) and RECIPES[module.recipe].in_the_weights:
            state[f"{name}.weight"] = RECIPES[module.recipe].weight(module.weight.detach()).dequantised()
    return state


def take_odd(model: nn.Module) -> Counter[str]:
    """What `Linear.odd` has counted, over all modules, since it was last taken."""
    total: Counter[str] = Counter()
    for module in model.modules():
        if odd := getattr(module, "odd", None):
            total += Counter({what: int(number) for what, number in odd.items()})
            odd.clear()
    return total


def recipe_of(precision: str) -> str | None:
    """The recipe that `precision=` names, if it is one."""
    return precision if precision in (*RECIPES, *BASES) else None


def in_shape(config: Any) -> dict[str, Any]:
    """Fields of the ModelShape that a run's configuration sets: `recipe`, and the `rank` of adapters."""
    return {"recipe": recipe_of(config.precision), "rank": config.rank if config.precision in BASES else 0}


def check(config: TrainConfig, device: torch.device) -> None:
    """Raises InputError where `precision=` is a recipe that the device, or another key, does not go with."""
    if not recipe_of(config.precision):
        return
    key = f"precision={config.precision}"
    if config.precision in BASES and not config.init_from:
        raise InputError(
            f"{key}: freezes the encoder, which from a random start would stay random; name weights to start from "
            "(init_from=runs/NAME/model), or another precision"
        )
    if config.precision in BASES:
        bitsandbytes()
    if device.type != "cpu":
        check_gpu(key, device)
    if config.compile:
        raise InputError(f"compile=true: does not go with {key}; set compile=false")


def check_gpu(key: str, device: torch.device) -> None:
    name = key.removeprefix("precision=")
    if name in BASES:
        raise InputError(f"{key}: has been tried on a CPU alone; set device=cpu")
    if name not in ON_GPU:
        raise InputError(f"{key}: has no GPU kernels; set device=cpu, or precision= to one of {', '.join(ON_GPU)}")
    if not importlib.util.find_spec("triton"):
        raise InputError(f"{key}: its GPU kernels need triton; pip install triton, or set device=cpu")
    if (found := torch.cuda.get_device_capability(device)) < FP8_SINCE:
        raise InputError(
            f"{key}: this GPU (sm_{found[0]}{found[1]}) does not multiply e4m3, which GPUs do from sm_89 on; set "
            "precision=bf16, or device=cpu"
        )
