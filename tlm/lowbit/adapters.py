"""Matrices frozen in 4 or 8 bits, and adapters that train beside them: LoRA (Hu et al. 2021, arXiv 2106.09685), over 4
bits QLoRA (Dettmers et al. 2023, arXiv 2305.14314). Legend: N rows, K inputs, O outputs, R the adapters' rank.

The bits are those of bitsandbytes: nf4 and fp4 with a scale for 64 numbers, int8-weight with one for a row. Products
are float32's, of inputs that are not rounded: this saves memory (weights, gradients and the optimizer's state), and no
time.
"""

import functools
import logging
import math
from dataclasses import replace
from types import ModuleType

import torch
from torch import nn

from tasks.errors import InputError
from tlm.config import BASES

BLOCK = 64  # numbers that share a scale in 4 bits
ALPHA = 16  # of LoRA, as in QLoRA: what the adapters give counts ALPHA / R times


@functools.cache
def bitsandbytes() -> ModuleType:
    """Its functions. Raises InputError where it is missing."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of 4-bit kernels that nothing here uses
    try:
        from bitsandbytes import functional
    except ImportError:
        raise InputError(
            f"precision={', '.join(BASES)}: bitsandbytes is missing, whose numbers these are; pip install 'tlm[lowbit]'"
        ) from None
    return functional


class Adapted(nn.Module):
    """A Linear without bias: `weight` and `scales` hold the frozen matrix [O, K], `lora_A` [R, K] and `lora_B` [O, R]
    train (there are none if R is 0). Empty until `freeze` or load_state_dict."""

    def __init__(self, inputs: int, outputs: int, base: str, rank: int):
        super().__init__()
        self.in_features, self.out_features, self.base = inputs, outputs, base
        rows = (outputs, inputs) if base == "int8-weight" else (inputs * outputs // BLOCK, BLOCK // 2)
        self.register_buffer("weight", torch.empty(rows, dtype=torch.int8 if base == "int8-weight" else torch.uint8))
        self.register_buffer("scales", torch.empty(rows[0]))
        self.rank = rank
        if rank:
            with torch.device("meta"):  # torch would draw from its global generator
                self.lora_A, self.lora_B = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
            self.to_empty(device="cpu")

    @torch.no_grad()
    def freeze(self, weight_OK: torch.Tensor, generator: torch.Generator | None = None) -> None:
        """Round the matrix; adapters begin as nothing: A is drawn, with variance 1 / K, and B is zero."""
        of = bitsandbytes()
        if self.base == "int8-weight":
            self.weight, self.scales, _ = of.int8_vectorwise_quant(weight_OK)
        else:  # as rows of one block: on a CPU bitsandbytes reads rows of other lengths wrongly
            self.weight, state = of.quantize_4bit(weight_OK.reshape(-1, BLOCK), blocksize=BLOCK, quant_type=self.base)
            self.weight, self.scales = self.weight.view(-1, BLOCK // 2), state.absmax
        if self.rank:
            nn.init.normal_(self.lora_A.weight, std=1 / math.sqrt(self.in_features), generator=generator)
            nn.init.zeros_(self.lora_B.weight)

    def dequantised(self) -> torch.Tensor:
        """float32 [O, K]."""
        of = bitsandbytes()
        if self.base == "int8-weight":
            return of.int8_vectorwise_dequant(self.weight, self.scales)
        shape = (len(self.scales), BLOCK)
        state = of.QuantState(self.scales, shape, blocksize=BLOCK, quant_type=self.base, dtype=torch.float32)
        return of.dequantize_4bit(self.weight.view(-1, 1), state).view(self.out_features, self.in_features)

    @torch.no_grad()
    def merged(self) -> torch.Tensor:
        """float32 [O, K], the adapters added."""
        plain = self.dequantised()
        return plain + ALPHA / self.rank * self.lora_B.weight @ self.lora_A.weight if self.rank else plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., O]."""
        out = Product.apply(x, self)
        return out + ALPHA / self.rank * self.lora_B(self.lora_A(x)) if self.rank else out

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, base={self.base}, rank={self.rank}"


class Product(torch.autograd.Function):
    """With the frozen matrix, which is float32 for the time of a product alone, in the backward pass once more."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, module: Adapted):
        ctx.module = module
        return x @ module.dequantised().T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: torch.Tensor):
        return g @ ctx.module.dequantised(), None


def trains(name: str) -> bool:
    """Whether a parameter of a Transformer over a frozen base does: adapters, soft prompts, and the heads."""
    return not name.startswith("model.") or ".lora_" in name or ".soft." in name


def adapters(model: nn.Module) -> dict[str, Adapted]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def num_parameters(model: nn.Module) -> int:
    """Frozen matrices, which are no parameters for torch, included."""
    frozen = sum(module.in_features * module.out_features for module in adapters(model).values())
    return frozen + sum(p.numel() for p in model.parameters())


def merge(model: nn.Module) -> str:
    """Put plain float32 matrices, adapters added, in the place of frozen ones. Returns what was done, "" if nothing."""
    found = adapters(model)
    for name, module in found.items():
        with torch.device("meta"):
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
        plain.weight = nn.Parameter(module.merged())
        model.set_submodule(name, plain.train(module.training))
    if not found:
        return ""
    recipe, rank = model.shape.recipe, model.shape.rank
    model.shape, model.conversion = replace(model.shape, recipe=None, rank=0), None
    return f"{len(found)} matrices of {recipe} with adapters of rank {rank} merged into fp32"
