"""DeepSpeed as the engine: what it is told, and how it starts on one CPU process or many.

ZeRO, clipping, accumulation, offload and the reduction over processes are DeepSpeed's; `deepspeed.*` keys go to its
configuration as they are.
"""

import atexit
import contextlib
import difflib
import io
import logging
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import nn

from tasks.errors import InputError
from tlm.config import StageConfig, TrainConfig
from tlm.model import Transformer
from tlm.optimizers import build_optimizer, parameter_groups


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

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise maximum of tensors over all processes."""
        if self.size == 1:
            return values
        from deepspeed import comm

        largest = values.to(self.device)
        comm.all_reduce(largest, op=comm.ReduceOp.MAX)
        return largest.to(values.device)

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


@contextlib.contextmanager
def in_touch():
    """Inside, another process that ended, or is beyond reach, is an InputError here."""
    try:
        yield
    except RuntimeError as error:  # gloo's have no class of their own
        if not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        reason = " ".join(str(error).split()).split("] ", 1)[-1][:160]
        raise InputError(
            f"process {os.environ.get('RANK')}: another process has ended or cannot be reached ({reason}); see to it, "
            "and start all of them by the same command: they go on from the last checkpoint"
        ) from None


def launch(device: torch.device = ALONE.device, timeout_minutes: float = 30.0) -> World:
    """Join the processes that a launcher started, or be the only one. Silence of the others for `timeout_minutes` is
    taken for their end.

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
    warnings.filterwarnings("ignore", r"`torch\.distributed\..* is deprecated", FutureWarning)  # DeepSpeed calls them
    buildable["deepspeed_shm_comm"] = False
    torch.set_flush_denormal(True)
    if not comm.is_initialized():
        patience, c10d = timedelta(minutes=timeout_minutes), torch.distributed.distributed_c10d
        c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = patience  # of the groups that DeepSpeed makes, too
        store, rank, size = meeting_place(patience)
        own = device if device.type == "cuda" else None
        torch.distributed.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=patience, device_id=own
        )
        if own:
            atexit.register(leave)
        with quiet():
            deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=patience)
    return World(comm.get_rank(), comm.get_world_size(), device)


def leave() -> None:
    """NCCL complains of a process group that is left as it is."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def meeting_place(patience: timedelta) -> tuple[torch.distributed.Store, int, int]:
    """Where processes leave their addresses for each other; this one's rank, and how many they are."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
            os.environ.setdefault(name, value)
        return torch.distributed.HashStore(), 0, 1  # in memory, no port: runs side by side do not collide
    store, rank, size = next(torch.distributed.rendezvous("env://", timeout=patience))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # Where torchrun starts processes again, the addresses of those that died are still in its store.
        store = torch.distributed.PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return store, rank, size


@contextlib.contextmanager
def quiet():
    """DeepSpeed prints what it builds and finds on standard output, where users expect results."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def check(config: TrainConfig) -> None:
    """Raises InputError for what ZeRO cannot do, at all or on a CPU; to be called before anything is written."""
    given = config.deepspeed.get("zero_optimization")
    zero = given.get("stage", 0) if isinstance(given, dict) else 0  # DeepSpeed refuses the rest itself
    if config.optimizer == "muon" and zero == 3:
        raise InputError(
            "deepspeed.zero_optimization.stage=3: cuts up every matrix, which Muon orthogonalises as a whole; set "
            "optimizer=adamw, or stage 2"
        )
    for key in ("zero_quantized_gradients", "zero_quantized_weights"):
        if isinstance(given, dict) and given.get(key) and device_of(config.device).type == "cpu":
            raise InputError(
                f"deepspeed.zero_optimization.{key}=true: DeepSpeed quantises what it sends on a GPU only; remove it, "
                "or send less by deepspeed.communication_data_type=bf16"
            )
    for name in ("joint", "finetune"):
        if zero == 3 and hasattr(config, name) and getattr(config, name).average != "none":
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
    if "optimizer" in extra:  # DeepSpeed's own, over our groups, whose rates and decay are the stage's
        config["optimizer"] = uncompiled(extra["optimizer"])
        built = {"model_parameters": parameter_groups(losses, "adamw", stage.weight_decay)}
    else:
        built = {"optimizer": build_optimizer(losses, optimizer, stage.weight_decay)}
    seen = Asked(config)
    with quiet():
        try:
            engine, *_ = deepspeed.initialize(model=losses, config=seen, **built)
        except (ValueError, TypeError, AssertionError, RuntimeError) as error:
            if not extra:
                raise
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"deepspeed.*: DeepSpeed refuses this configuration ({reason}); mend or remove it"
            ) from None
    for key in extra.keys() - seen.asked:
        near = difflib.get_close_matches(str(key), seen.asked, 1, 0.5)
        hint = f"did you mean deepspeed.{near[0]}?" if near else "remove it"
        raise InputError(f"deepspeed.{key}: DeepSpeed knows no such key; {hint}")
    engine.config = config  # stands in checkpoints, which hold plain values alone
    if engine.zero_optimization():
        forget_gradients(engine.optimizer)
    return engine


class Asked(dict):
    """A configuration that keeps in `asked` what DeepSpeed looks for: it has no list of keys, and ignores others."""

    def __init__(self, content: dict, asked: set[str] | None = None):
        super().__init__(content)
        self.asked = set() if asked is None else asked

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self):
        return self  # DeepSpeed asks for `key in config.keys()` as well

    def __copy__(self):
        return Asked(self, self.asked)


def uncompiled(optimizer: Any) -> Any:
    """On a CPU, torch's AdamW in place of DeepSpeed's, which would be compiled for minutes before the first step."""
    asked = isinstance(optimizer, dict) and str(optimizer.get("type", "")).lower() in ("adam", "adamw")
    if not asked or torch.cuda.is_available():
        return optimizer
    return {**optimizer, "params": {"torch_adam": True, **(optimizer.get("params") or {})}}


def forget_gradients(optimizer) -> None:
    """After each step. ZeRO 3, and 1 and 2 with offload, would step again by the last gradient of what a batch does not
    use: the head of the other objective."""
    step = optimizer.step
    flat = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")

    def stepped(closure=None) -> None:
        step(closure)
        kept = [p.grad for name in flat for p in getattr(optimizer, name, [])]
        for gradient in [getattr(optimizer, "grad_partitions_flat_buffer", None), *kept]:
            if gradient is not None:
                gradient.zero_()

    optimizer.step = stepped


def whole(model: Transformer) -> Transformer:
    """The model itself; under ZeRO 3, where each process holds a part of every parameter, a copy that is whole."""
    if not any(hasattr(p, "ds_id") for p in model.parameters()):
        return model
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    result = Transformer(model.shape, generator=None)
    with GatheredParameters(list(model.parameters())):
        result.load_state_dict(model.state_dict())
    return result.train(model.training)


def set_rates(engine, stage: StageConfig, share: float) -> None:
    """Give each parameter group `share` of its peak learning rate."""
    for group in engine.optimizer.param_groups:
        group["lr"] = share * getattr(stage, group["rate"])


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
    """Norm of the reduced gradient before clipping; call between backward and step.

    DeepSpeed's own get_global_grad_norm is that of the step before.
    """
    if not engine.zero_optimization():
        return float(nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))
    if engine.zero_optimization_stage() < 3:
        return float(engine.optimizer.scaled_global_norm())
    from deepspeed.runtime.utils import combine_grad_norm_groups

    return float(combine_grad_norm_groups(engine.optimizer._get_norm_groups()))
