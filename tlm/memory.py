"""What a step holds in memory, and `micro_batch=`: how many tokens a process computes at once.

A micro-batch that is too large for that is computed in parts, one after the other. Losses are normalised over the whole
step (see objectives.py), so the step stays what it is, but for rounding. `auto` begins with everything at once and
halves until it fits. On a GPU it is tried; on a CPU, where no allocation fails but the kernel kills, it is estimated.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tasks.errors import InputError
from tlm.attention import LONGEST
from tlm.batches import IGNORE, pack
from tlm.engine import World
from tlm.mixture import Mixture
from tlm.model import ModelShape
from tlm.objectives import Objective
from tlm.optimizers import PARTS
from tlm.precision import autocasts

MARGIN = 1.3  # needed over estimated bytes: what torch and its allocator keep beside what is counted (measured)


def activation_bytes(shape: ModelShape, tokens: int, length: int, masked: int, checkpointing: bool = False) -> int:
    """What a micro-batch of texts of `length` tokens keeps for its backward pass on a CPU, in fp32.

    A layer keeps 10 hidden and 4 intermediate numbers a token (counted: inputs of both norms and of the four matrix
    products, queries, keys, values, the gate and its activation), and the attention weights of short texts, or once
    more what attention gave of long ones; with `checkpointing` its input alone, and all of it for one layer at a time.
    The masked-LM head keeps 4 hidden numbers a masked token and the decoder's gradient, beside a block of logits.
    """
    attention = shape.heads * length if length <= LONGEST else shape.hidden
    whole = 10 * shape.hidden + 4 * shape.intermediate + attention
    layers = shape.layers * shape.hidden + whole if checkpointing else shape.layers * whole
    decoder = shape.vocabulary * (shape.hidden + 1) if masked else 0
    return 4 * (tokens * layers + 4 * masked * shape.hidden + decoder)


def optimizer_bytes(optimizer: str, parameters: int, matrices: int) -> int:
    """State of the optimizer: two fp32 moments a parameter for AdamW, two bytes if they are of 8 bits; Muon keeps one
    fp32 momentum of the layers' `matrices`, of the `parameters`, and leaves the others to AdamW."""
    if optimizer == "adamw8bit":
        return 2 * parameters
    return 8 * parameters - (4 * matrices if optimizer == "muon" else 0)


def tokens_at_once(setting: str, fits: Callable[[int], bool], most: int, longest: int, world: World) -> int | None:
    """Tokens that each process computes at once; None for no limit. `most`: tokens of the largest micro-batch.

    Raises InputError where not even one text, of the `longest` tokens, fits.
    """
    if setting != "auto":
        return None if setting == "none" else int(setting)
    tokens = most
    while world.sum([not fits(tokens)])[0]:  # all processes try and halve together
        if tokens <= longest:
            raise InputError(
                f"micro_batch=auto: not even {longest} tokens fit into memory; lower model.max_length, choose a "
                "smaller model.size, or set activation_checkpointing=true"
            )
        tokens = max(longest, tokens // 2)
    return tokens


def choose(
    setting: str,
    losses: nn.Module,
    objective: Objective,
    mixture: Mixture,
    optimizer: str,
    precision: str,
    world: World,
) -> int | None:
    """`tokens_at_once` of a stage, found with its model before DeepSpeed has it."""
    model = losses.model
    lengths = {name: int(source.lengths.max()) for name, source in objective.sources.items()}
    longest = max(lengths.values())
    most = max(-(-mixture.batch[name] // world.size) * length for name, length in lengths.items())
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    parameters = sum(trained.values())
    matrices = sum(trained[name] for name in trained if name.split(".")[-2] in PARTS)
    state = optimizer_bytes(optimizer, parameters, matrices)
    rate = objective.rate

    def estimated(tokens: int) -> bool:
        step = activation_bytes(model.shape, tokens, longest, round(tokens * rate), model.model.checkpointing)
        gradients, checkpoint = 4 * parameters, 4 * parameters + state
        return MARGIN * (gradients + state + checkpoint + step) < room

    def tried(tokens: int) -> bool:
        return runs(losses, tokens, longest, rate, 4 * parameters + state, precision, world.device)

    room = available_bytes() / processes_here(world)
    fits = tried if world.device.type == "cuda" else estimated
    return tokens_at_once(setting, fits, most, longest, world)


def runs(
    losses: nn.Module, tokens: int, length: int, rate: float, reserve: int, precision: str, device: torch.device
) -> bool:
    """Whether forward and backward of `tokens` tokens run on a GPU, with `reserve` bytes held for what comes later."""
    one = np.full(length, losses.model.shape.mask_id)
    targets = np.where(np.arange(length) < np.ceil(rate * length), one, IGNORE)
    texts = max(1, tokens // length)
    try:
        held = torch.empty(reserve, dtype=torch.uint8, device=device)
        batch = pack([one] * texts, [targets] * texts, [0] * texts).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocasts(precision, device)):
            sum(loss for loss in losses(batch, rate > 0, True) if loss is not None).backward()
        del held
    except torch.OutOfMemoryError:
        return False
    finally:
        losses.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def processes_here(world: World) -> int:
    """Processes of the run on this machine, as torchrun and DeepSpeed's launcher tell."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world.size)


def available_bytes(root: Path = Path("/")) -> float:
    """Memory that this process may still take: what the machine has left, or less where a cgroup says so."""
    import psutil

    return min([psutil.virtual_memory().available, *cgroup_rooms(root)])


def cgroup_rooms(root: Path) -> list[int]:
    """Bytes left below the limit of each of this process's control groups, of version 1 or 2, that has one."""
    rooms = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not a Linux
        return []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        limit, used, cache = V1 if controllers else V2
        own = top / path.strip("/")
        for folder in {own, *own.parents, top} - set(top.parents):
            try:
                room = int((folder / limit).read_text()) - int((folder / used).read_text())
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                rooms.append(room + int(statistics.get(cache, 0)))  # the kernel gives cached files up first
            except (OSError, ValueError):  # no such file here, or `max`: no limit
                continue
    return rooms


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")
