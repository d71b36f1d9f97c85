"""DeepSpeed as the engine: what it is told, how it starts on one CPU process or many, how it saves and loads.

ZeRO, clipping, accumulation, offload and the reduction over processes are DeepSpeed's; `deepspeed.*` keys go to its
configuration as they are. A checkpoint is a folder `ckpt/<stage>-<step>` that is written under another name, hashed,
and renamed; the file `latest` is replaced last. A kill at any instant leaves the last whole checkpoint in force.
"""

import contextlib
import io
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from retrieval.folders import sync
from tasks.errors import InputError
from tasks.files import sha256 as file_sha256
from tlm.config import StageConfig
from tlm.optimizers import Muon, parameter_groups
from tlm.run import read_json, write_json, write_text


@dataclass(frozen=True)
class World:
    """The processes of a run and this one's place among them."""

    rank: int
    size: int

    def sum(self, values) -> list[float]:
        """Element-wise sum of numbers over all processes."""
        if self.size == 1:
            return list(values)
        from deepspeed import comm

        total = torch.tensor(np.asarray(values), dtype=torch.float64)
        comm.all_reduce(total)
        return total.tolist()

    def agrees(self, yes: bool) -> bool:
        """The first process's answer, for all."""
        return self.sum([float(yes and self.rank == 0)])[0] > 0

    def barrier(self) -> None:
        if self.size > 1:
            from deepspeed import comm

            comm.barrier()


ALONE = World(0, 1)
KEEP_CHECKPOINTS = 2  # the last two: one is always whole while the next is written


def launch() -> World:
    """Join the processes that a launcher started, or be the only one.

    DeepSpeed would compile a shared-memory all-reduce for CPUs at every first start: half a minute and a C++ compiler,
    and a start that was killed leaves a lock that the next waits on for ever. Gloo's all-reduce does without; models
    that CPUs train are small.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
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
            torch.distributed.init_process_group(backend(), store=store, rank=0, world_size=1)
        with quiet():
            deepspeed.init_distributed(dist_backend=backend(), auto_mpi_discovery=False, verbose=False)
    return World(comm.get_rank(), comm.get_world_size())


def backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


@contextlib.contextmanager
def quiet():
    """DeepSpeed prints what it builds and finds on standard output, where users expect results."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def initialize(losses: nn.Module, stage: StageConfig, optimizer: str, precision: str, extra: dict[str, Any]):
    """The DeepSpeed engine of one stage. `losses` holds the model; `extra` overrides DeepSpeed's configuration.

    Raises InputError for what cannot work together.
    """
    import deepspeed

    zero = (extra.get("zero_optimization") or {}).get("stage", 0)
    if optimizer == "muon" and zero:
        raise InputError(
            f"deepspeed.zero_optimization.stage={zero}: ZeRO cuts matrices into flat pieces, which Muon cannot "
            "orthogonalise; set optimizer=adamw, or stage 0"
        )
    config = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only multiplies it; our micro-batches hold any number of texts
        "gradient_accumulation_steps": stage.accumulation,
        "gradient_clipping": stage.clip,
        "zero_optimization": {"stage": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 10**9,
        **extra,
    }
    groups = parameter_groups(losses, optimizer, stage.weight_decay)
    with quiet():
        try:
            engine, *_ = deepspeed.initialize(model=losses, optimizer=Muon(groups), config=config)
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


def gradient_norm(engine) -> float:
    """Norm of the reduced gradient before clipping; call between backward and step."""
    norm = engine.get_global_grad_norm() if engine.zero_optimization() else None
    if norm is None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    return float(norm)


# --- checkpoints ---


def save(engine, folder: Path, tag: str, state: dict, world: World) -> None:
    """Write checkpoint `tag` into `folder`, whole or not at all; then make it the latest and drop the oldest."""
    half = folder / f"{tag}.half"
    try:
        if world.rank == 0:
            shutil.rmtree(half, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
        world.barrier()
        with quiet():
            engine.save_checkpoint(str(folder), tag=half.name, client_state=state, save_latest=False)
        world.barrier()
        if world.rank == 0:
            files = {str(p.relative_to(half)): file_sha256(str(p)) for p in sorted(half.rglob("*")) if p.is_file()}
            write_json(half / "manifest.json", {"tag": tag, "files": files})
            for name in files:
                sync(half / name)
            shutil.rmtree(folder / tag, ignore_errors=True)
            os.replace(half, folder / tag)
            sync(folder)
            write_text(folder / "latest", tag + "\n")
            prune(folder, tag)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its own words
        shutil.rmtree(half, ignore_errors=True)
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"{folder / tag}: the checkpoint cannot be written ({reason}; is the disk full?); make room and give the "
            f"same command again: it goes on from {latest(folder) or 'the start'}"
        ) from None


def load(engine, folder: Path, tag: str) -> dict:
    """Restore checkpoint `tag`, after its checksums; returns the state saved with it."""
    verify(folder / tag)
    with quiet():
        path, state = engine.load_checkpoint(str(folder), tag=tag)
    if path is None:
        raise InputError(f"{folder / tag}: DeepSpeed cannot read it; delete the run folder and start again")
    return state


def verify(folder: Path) -> None:
    manifest = folder / "manifest.json"
    files = read_json(manifest)["files"] if manifest.exists() else None
    paths = {folder / name: sha for name, sha in (files or {}).items()}
    damaged = files is None or any(not p.exists() or file_sha256(str(p)) != sha for p, sha in paths.items())
    if damaged:
        stage = folder.name.split("-")[0]
        others = sorted(m.parent.name for m in folder.parent.glob(f"{stage}-*/manifest.json") if m.parent != folder)
        mend = f"put {others[-1]} into {folder.parent / 'latest'}" if others else "delete the run folder"
        raise InputError(f"{folder}: this checkpoint is damaged; {mend} to go on from what is whole")


def latest(folder: Path) -> str | None:
    """The tag that `latest` names, or None before the first checkpoint."""
    try:
        return (folder / "latest").read_text().strip()
    except FileNotFoundError:
        return None


def prune(folder: Path, newest: str) -> None:
    """Keep the newest checkpoint and those just before it; drop what a kill left half-written."""
    for half in folder.glob("*.half"):
        shutil.rmtree(half, ignore_errors=True)
    older = [m.parent for m in folder.glob("*-*/manifest.json") if m.parent.name != newest]
    older.sort(key=lambda path: path.stat().st_mtime)
    for old in older[: len(older) - KEEP_CHECKPOINTS + 1]:
        shutil.rmtree(old, ignore_errors=True)
