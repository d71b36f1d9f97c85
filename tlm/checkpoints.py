"""Checkpoints: written in the background, whole or not at all, checked when they are read, and free of code.

A checkpoint is a folder `ckpt/<stage>-<step>`. DeepSpeed says what belongs into it; its files are written under another
name, hashed, and the folder is renamed; the file `latest` is replaced last. A kill at any instant leaves the last whole
checkpoint in force. Reading admits tensors and plain values only: a checkpoint from a stranger runs nothing.
"""

import contextlib
import copyreg
import hashlib
import io
import os
import shutil
import threading
import time
from pathlib import Path

import torch

from retrieval.folders import sync
from tasks.errors import InputError
from tasks.files import sha256 as file_sha256
from tlm.engine import World, quiet
from tlm.pieces import num_pieces, recut
from tlm.run import read_json, write_json, write_text


class Checkpoints:
    """The checkpoints of a run. One at most is being written, while the training goes on."""

    def __init__(self, folder: Path, world: World, keep: int = 2, patience_seconds: float = 600):
        """`keep`: how many stay on disk; the one in force is never among those that are dropped. `patience_seconds`:
        for the other processes' files, which lie on a disk that all of them share."""
        self.folder, self.world, self.keep, self.patience_seconds = folder, world, keep, patience_seconds
        self.thread: threading.Thread | None = None
        self.error: OSError | None = None

    def save(self, engine, tag: str, state: dict) -> None:
        """Copy what `tag` holds and begin to write it. Raises InputError if the one before could not be written."""
        self.wait()
        files: dict[Path, io.BytesIO] = {}

        def keep(state_dict, path: str) -> None:
            files[Path(path)] = serialized(state_dict)

        half = self.folder / f"{tag}.half"
        try:
            if self.world.rank == 0:
                shutil.rmtree(half, ignore_errors=True)
                self.folder.mkdir(parents=True, exist_ok=True)
            self.world.barrier()
            with quiet(), through(engine, save=keep):
                engine.save_checkpoint(str(self.folder), tag=half.name, client_state=state, save_latest=False)
        except OSError as error:
            self.refuse(half, error)
        # A daemon: a process that ends for a fault does not wait for others, which may have ended as well.
        self.thread = threading.Thread(target=self.write, args=(tag, half, files), daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Until the last one is on disk. Raises InputError if it could not be written; those before are untouched."""
        if self.thread:
            self.thread.join()
            self.thread = None
        if self.error:
            error, self.error = self.error, None
            self.refuse(self.folder, error)

    def write(self, tag: str, half: Path, files: dict[Path, io.BytesIO]) -> None:
        """In the background, without a word to other processes but through the disk: gloo is not for two threads."""
        try:
            hashes = {}
            for path, content in files.items():
                with open(path, "wb") as file:
                    file.write(content.getbuffer())
                    file.flush()
                    os.fsync(file.fileno())
                hashes[str(path.relative_to(half))] = hashlib.sha256(content.getbuffer()).hexdigest()
            write_json(half / f"written-{self.world.rank}.json", hashes)
            if self.world.rank == 0:
                self.commit(tag, half)
        except (OSError, InputError) as error:
            shutil.rmtree(half, ignore_errors=True)
            self.error = error if isinstance(error, OSError) else OSError(0, str(error))

    def commit(self, tag: str, half: Path) -> None:
        parts = [half / f"written-{rank}.json" for rank in range(self.world.size)]
        end = time.monotonic() + self.patience_seconds
        while not all(part.exists() for part in parts):
            if time.monotonic() > end:
                raise OSError(0, "the files of other processes did not come; all hosts need one shared folder out=")
            time.sleep(0.02)
        files = {name: sha for part in parts for name, sha in read_json(part).items()}
        write_json(half / "manifest.json", {"tag": tag, "files": files})
        for part in parts:
            part.unlink()
        sync(half)
        shutil.rmtree(self.folder / tag, ignore_errors=True)
        os.replace(half, self.folder / tag)
        sync(self.folder)
        write_text(self.folder / "latest", tag + "\n")
        prune(self.folder, tag, self.keep)

    def refuse(self, path: Path, error: OSError) -> None:
        going_on = latest(self.folder)
        raise InputError(
            f"{path}: the checkpoint cannot be written ({error.strerror or error}); make room and give the same "
            f"command again: it goes on from {going_on or 'the start'}"
        ) from None

    def load(self, engine, tag: str) -> dict:
        """Restore checkpoint `tag`, after its checksums; returns the state saved with it."""
        self.wait()
        folder = self.folder / tag
        verify(folder)
        as_written = num_pieces(folder) in (0, self.world.size)
        pieces = contextlib.nullcontext(read) if as_written else recut(engine, folder, self.world, read)
        with quiet(), pieces as load, through(engine, load=load):
            path, state = engine.load_checkpoint(str(self.folder), tag=tag)
        if path is None:
            raise InputError(f"{folder}: DeepSpeed cannot read it; delete the run folder and start again")
        return state


@contextlib.contextmanager
def through(engine, **functions):
    """DeepSpeed's own reading or writing of a file, replaced for a while."""
    files = engine.checkpoint_engine
    vars(files).update(functions)
    try:
        yield
    finally:
        for name in functions:
            delattr(files, name)


def serialized(content) -> io.BytesIO:
    """torch.save into memory: a copy that the next step cannot change."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    # By itself Python before 3.11.4 writes a member as a call of getattr, which `read` rightly refuses to make.
    copyreg.pickle(ZeroStageEnum, lambda member: (ZeroStageEnum, (member.value,)))
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer


def read(path: str, map_location=None):
    """torch.load that runs no code: tensors, plain values, and the few plain classes that ZeRO stores."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # pickle.UnpicklingError and, for torn archives, RuntimeError and others
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: holds more than tensors and plain values, and is not opened ({reason})") from None


def verify(folder: Path) -> None:
    """Raises InputError, with the mend, if a file of the checkpoint is missing or differs from its checksum."""
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


def prune(folder: Path, newest: str, keep: int) -> None:
    """Keep the newest checkpoint and those just before it; drop what a kill left half-written."""
    for half in folder.glob("*.half"):
        shutil.rmtree(half, ignore_errors=True)
    older = [m.parent for m in folder.glob("*-*/manifest.json") if m.parent.name != newest]
    older.sort(key=lambda path: path.stat().st_mtime)
    for old in older[: max(0, len(older) - keep + 1)]:
        shutil.rmtree(old, ignore_errors=True)
