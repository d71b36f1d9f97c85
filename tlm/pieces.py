"""ZeRO's pieces of the optimizer, cut anew when another number of processes goes on from a checkpoint.

DeepSpeed reads a ZeRO checkpoint with as many processes as wrote it. Its universal checkpoints would do more, but are
read by unpickling whatever is in them, and know Adam's states alone. So what is read here, weights only, is all old
pieces; what DeepSpeed is given is the piece that this process would have written itself.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

import torch

from tasks.errors import InputError
from tlm.engine import World

Read = Callable[..., dict]


def num_pieces(folder: Path) -> int:
    """How many processes' pieces of the optimizer lie in the folder of a checkpoint; 0 without ZeRO."""
    return len(list(folder.glob("*_optim_states.pt")))


@contextlib.contextmanager
def recut(engine, folder: Path, world: World, read: Read) -> Iterator[Read]:
    """Inside, DeepSpeed finds what `read` yields as if `world` had written it."""
    count, models = num_pieces(folder), sorted(folder.glob("*_model_states.pt"))

    def load(path: str, map_location=None) -> dict:
        if not path.endswith("_optim_states.pt"):
            model = read(str(models[0]), map_location)
            check_layout(engine, model["param_shapes"], folder, count, world)
            return model | {"dp_world_size": world.size}
        old = [read(re.sub(r"pp_rank_\d+", f"pp_rank_{i}", path), map_location) for i in range(count)]
        states = [piece["optimizer_state_dict"] for piece in old]
        cut = cut_stage_3 if "fp32_flat_groups" in states[0] else cut_stages_1_and_2
        try:
            return old[0] | {"optimizer_state_dict": cut(states, engine.optimizer, world)}
        except ValueError as error:
            raise InputError(refusal(folder, count, world, str(error))) from None

    # Under stage 3 every process has a model file, of weights that stand in the optimizer's pieces anyway.
    engine._get_all_ckpt_names = lambda *_: [str(models[0])]
    try:
        yield load
    finally:
        del engine._get_all_ckpt_names


def check_layout(engine, shapes: list[dict], folder: Path, count: int, world: World) -> None:
    """Raises InputError if parameters stand in another order than they would now."""
    same = [list(group.items()) for group in shapes] == [list(g.items()) for g in engine._get_zero_param_shapes()]
    if not same or any(map(any, getattr(engine.optimizer, "round_robin_bit16_padding", []))):
        reason = "round_robin_gradients, parameter_alignment or sub_group_size order them by the number of processes"
        raise InputError(refusal(folder, count, world, reason))


def refusal(folder: Path, count: int, world: World, reason: str) -> str:
    return (
        f"{folder}: the optimizer's {count} pieces cannot be cut for {world.size} process(es) ({reason}); go on with "
        f"as many as wrote them: {count}"
    )


def cut_stages_1_and_2(states: list[dict], optimizer, world: World) -> dict:
    """This process's optimizer state from all old ones. A group of parameters is one flat tensor, padded at its end."""
    groups = optimizer.round_robin_bit16_groups
    totals = [sum(p.numel() for p in group) for group in groups]
    widths = [len(piece) for piece in optimizer.single_partition_of_fp32_groups]

    def one(pieces: list[torch.Tensor], group: int) -> torch.Tensor:
        return cut(pieces, [totals[group]], [len(pieces[0])], [widths[group]], world.rank)

    key, weights = "base_optimizer_state", "single_partition_of_fp32_groups"
    return states[0] | {
        key: cut_moments([state[key] for state in states], one),
        weights: [one(pieces, i) for i, pieces in enumerate(zip(*(state[weights] for state in states), strict=True))],
        "group_paddings": optimizer.groups_padding,
        "partition_count": optimizer.partition_count,
    }


def cut_stage_3(states: list[dict], optimizer, world: World) -> dict:
    """The same where each parameter is cut, and a group is what a process has of its parameters, end to end."""
    totals = [[p.ds_numel for p in group] for group in optimizer.fp16_groups]

    def one(pieces: list[torch.Tensor], group: int) -> torch.Tensor:
        old, new = ([math.ceil(n / size) for n in totals[group]] for size in (len(pieces), world.size))
        return cut(pieces, totals[group], old, new, world.rank)

    key, weights = "optimizer_state_dict", "fp32_flat_groups"
    return states[0] | {
        key: cut_moments([state[key] for state in states], one),
        weights: [one(pieces, i) for i, pieces in enumerate(zip(*(state[weights] for state in states), strict=True))],
        "partition_count": optimizer.partition_count,
    }


def cut_moments(states: list[dict], one: Callable[[list[torch.Tensor], int], torch.Tensor]) -> dict:
    """torch's state_dict of an optimizer whose every group is one flat tensor. Single numbers are the same in all."""
    moments = {
        group: {
            name: one([state["state"][group][name] for state in states], group) if is_cut(value) else value
            for name, value in values.items()
        }
        for group, values in states[0]["state"].items()
    }
    return states[0] | {"state": moments}


def is_cut(value) -> bool:
    """Whether a value of an optimizer's state is a piece. Raises ValueError for moments in 8 bits: bytes of ours, a
    dict of bitsandbytes."""
    if isinstance(value, dict) or (isinstance(value, torch.Tensor) and value.dtype == torch.uint8):
        raise ValueError("8-bit moments are scaled in blocks, which cannot be cut")
    return isinstance(value, torch.Tensor) and value.ndim > 0


def cut(pieces: list[torch.Tensor], totals: list[int], old: list[int], new: list[int], rank: int) -> torch.Tensor:
    """What `rank` is to hold of runs of `totals` elements. Old processes held, end to end, `old` elements of each run,
    new ones hold `new`; the last are padded by zeros. Raises ValueError if the pieces are of other sizes."""
    result = []
    for total, start, width, length in zip(totals, accumulate(old, initial=0), old, new, strict=False):
        run = torch.cat([piece[start : start + width] for piece in pieces])[:total]
        if len(run) != total:
            raise ValueError(f"{len(run):,} numbers where {total:,} were expected")
        mine = run[rank * length : (rank + 1) * length]
        result.append(torch.nn.functional.pad(mine, (0, length - len(mine))))
    return torch.cat(result)
