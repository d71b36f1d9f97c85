"""DeepSpeed as the engine: what it is told, and how it starts on one CPU process or many.

ZeRO, clipping, accumulation, offload and the reduction over processes are DeepSpeed's; `deepspeed.*` keys go to its
configuration as they are.
"""

import contextlib
import io
import logging
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from tasks.errors import InputError
from tlm.config import StageConfig, TrainConfig
from tlm.optimizers import build_optimizer


@dataclass(frozen=True)
class World:
    """The processes of a run and this one's place among them."""

    rank: int
    size: int
    device: torch.device = torch.device("cpu")

    def sum(self, values) -> list[float]:
        """Element-wise sum of numbers over all processes."""
        if self.size == 1:
            return list(values)
        from deepspeed import comm

        total = torch.tensor(np.asarray(values), dtype=torch.float64, device=self.device)
        comm.all_reduce(total)
        return total.tolist()

    def barrier(self) -> None:
        if self.size > 1:
            from deepspeed import comm

            comm.barrier()


ALONE = World(0, 1)


def device_of(name: str) -> torch.device:
    """The device that `device=` names for this process. Raises InputError if it is not there."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not found):
        return torch.device("cpu")
    if not found:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no GPU answers"
        raise InputError(f"device=cuda: {why}; set device=cpu, or see `tlm doctor`")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= found:
        raise InputError(f"device=cuda: more processes than the {found} GPUs of this machine; start one for each GPU")
    return torch.device("cuda", local)


def launch(device: torch.device = ALONE.device) -> World:
    """Join the processes that a launcher started, or be the only one.

    DeepSpeed would compile a shared-memory all-reduce for CPUs at every first start: half a minute and a C++ compiler,
    and a start that was killed leaves a lock that the next waits on for ever. Gloo's all-reduce does without; models
    that CPUs train are small.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with quiet():
        import deepspeed
        from deepspeed import comm
        from deepspeed.ops import __compatible_ops__ as buildable

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    buildable["deepspeed_shm_comm"] = False
    torch.set_flush_denormal(True)
    if not comm.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
                os.environ.setdefault(name, value)
            store = torch.distributed.HashStore()  # in memory, no port: runs side by side do not collide
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        with quiet():
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return World(comm.get_rank(), comm.get_world_size(), device)


@contextlib.contextmanager
def quiet():
    """DeepSpeed prints what it builds and finds on standard output, where users expect results."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def check(config: TrainConfig) -> None:
    """Raises InputError for what ZeRO cannot do; to be called before anything is written."""
    given = config.deepspeed.get("zero_optimization")
    zero = given.get("stage", 0) if isinstance(given, dict) else 0  # DeepSpeed refuses the rest itself
    if config.optimizer == "muon" and zero:
        raise InputError(
            f"deepspeed.zero_optimization.stage={zero}: ZeRO cuts matrices into flat pieces, which Muon cannot "
            "orthogonalise; set optimizer=adamw, or stage 0"
        )
    for name in ("joint", "finetune"):
        if zero == 3 and getattr(config, name).average != "none":
            raise InputError(
                f"deepspeed.zero_optimization.stage=3: cuts up what {name}.average would keep; set {name}.average=none"
            )


def initialize(losses: nn.Module, stage: StageConfig, optimizer: str, autocast: bool, extra: dict[str, Any]):
    """The DeepSpeed engine of one stage. `losses` holds the model; `extra` overrides DeepSpeed's configuration.

    `autocast`: to bfloat16, on a GPU. Raises InputError for what DeepSpeed refuses.
    """
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only multiplies it; our micro-batches hold any number of texts
        "gradient_accumulation_steps": stage.accumulation,
        "gradient_clipping": stage.clip,
        "zero_optimization": {"stage": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {"enabled": autocast, "dtype": "bfloat16"},
        "steps_per_print": 10**9,
        **extra,
    }
    built = build_optimizer(losses, optimizer, stage.weight_decay)
    with quiet():
        try:
            engine, *_ = deepspeed.initialize(model=losses, optimizer=built, config=config)
        except (ValueError, TypeError, AssertionError, RuntimeError) as error:
            if not extra:
                raise
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"deepspeed.*: DeepSpeed refuses this configuration ({reason}); mend or remove it"
            ) from None
    return engine


def set_rates(engine, stage: StageConfig, share: float) -> None:
    """Give each parameter group `share` of its peak learning rate."""
    for group in engine.optimizer.param_groups:
        group["lr"] = getattr(stage, group["rate"]) * share


@contextlib.contextmanager
def idle(engine):
    """Steps of the engine drop their gradients and change nothing."""
    optimizer = engine.basic_optimizer
    optimizer.step = lambda closure=None: None
    try:
        yield
    finally:
        del optimizer.step


def gradient_norm(engine) -> float:
    """Norm of the reduced gradient before clipping; call between backward and step."""
    norm = engine.get_global_grad_norm() if engine.zero_optimization() else None
    if norm is None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    return float(norm)
