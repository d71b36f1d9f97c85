"""The run folder: what was asked, on what machine, from what data, and what came of it.

`config.yaml` is written first, `summary.json` last and atomically: it exists when the run has finished. `metrics.jsonl`
is appended to; a run that goes on from a checkpoint first cuts it back to where that checkpoint was written, so that a
run which was killed leaves the same lines as one that was not.
"""

import contextlib
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from tasks.errors import InputError
from tlm import __version__
from tlm import config as configs


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Atomically: a reader sees the old file or the whole new one. A full disk is an InputError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # where the folder is none, there is nothing to remove
            temporary.unlink()
        raise InputError(f"{path}: cannot be written ({error.strerror}); make room or name another folder") from None


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; name the folder of a run") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: damaged ({error}); restore it or run again under another name") from None


class Run:
    """A run folder. Nothing is written before `begin`, so that bad input leaves nothing behind."""

    def __init__(self, folder: Path, config: Any, writes: bool = True):
        """`writes`: whether this is the process that writes. Raises InputError if the folder holds something else."""
        self.folder, self.config, self.writes, self.config_sha256 = folder, config, writes, configs.sha256(config)
        self.metrics_path = folder / "metrics.jsonl"
        known = folder / "config.yaml"
        if known.exists():
            if not same_result(known, config):
                raise InputError(
                    f"{folder}: holds a run with another configuration; choose another run=NAME, or delete the folder"
                )
        elif taken := next((above for above in (folder, *folder.parents) if above.is_file()), None):
            raise InputError(f"{taken}: is a file; choose another out=FOLDER or run=NAME")
        elif folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder}: is not empty and holds no run; choose another run=NAME")

    def begin(self, inputs: list[dict]) -> None:
        """Write what is asked, where it runs, and path, rows and sha256 of everything read.

        Raises InputError if data has changed since the run began.
        """
        from omegaconf import OmegaConf

        path = self.folder / "inputs.json"
        if path.exists():
            old = {i["path"]: i["sha256"] for i in read_json(path)}
            for name, sha in ((i["path"], i["sha256"]) for i in inputs):
                if old.get(name, sha) != sha:
                    raise InputError(
                        f"{name}: has changed since run {self.folder} began (sha256 {old[name][:12]} then, {sha[:12]} "
                        "now); restore it or choose another run=NAME"
                    )
        if self.writes:
            write_text(self.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(self.config)))
            write_json(self.folder / "env.json", environment())
            write_json(path, inputs)

    def micro_batches(self) -> dict[str, int]:
        """What micro_batch=auto chose, by stage: a run that goes on keeps to it, so as to end the same."""
        path = self.folder / "micro_batch.json"
        return read_json(path) if self.config.micro_batch == "auto" and path.exists() else {}

    def keep_micro_batch(self, stage: str, tokens: int) -> None:
        if self.writes and self.config.micro_batch == "auto":
            write_json(self.folder / "micro_batch.json", self.micro_batches() | {stage: tokens})

    @property
    def checkpoints(self) -> Path:
        return self.folder / "ckpt"

    @property
    def summary_path(self) -> Path:
        return self.folder / "summary.json"

    def record(self, **values: Any) -> None:
        if self.writes:
            try:
                with open(self.metrics_path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(values) + "\n")
            except OSError as error:
                raise InputError(f"{self.metrics_path}: cannot be written ({error.strerror}); make room") from None

    def metrics_bytes(self) -> int:
        return self.metrics_path.stat().st_size if self.metrics_path.exists() else 0

    def cut_metrics(self, size: int) -> None:
        """Forget what was recorded after a checkpoint that had seen `size` bytes."""
        if self.writes and self.metrics_path.exists():
            os.truncate(self.metrics_path, min(size, self.metrics_bytes()))


def same_result(path: Path, config: Any) -> bool:
    """Whether the configuration in `path` leads to the same result as `config`."""
    try:
        return configs.sha256(configs.load(type(config), [str(path)])) == configs.sha256(config)
    except InputError:
        return False  # keys of another version


def environment() -> dict:
    import importlib.metadata as metadata

    versions = {}
    for name in ("torch", "deepspeed", "tokenizers", "numpy", "numba", "scikit-learn"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "tlm": __version__,
        "git_commit": git_commit(),
        "command": " ".join(["tlm", *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "versions": versions,
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def git_commit() -> str | None:
    """The commit of the checkout that this file lies in, read without calling git."""
    git = Path(__file__).resolve().parent.parent / ".git"
    try:
        if git.is_file():  # of `git worktree`: names its own folder, which names the one that all share
            own = Path(git.read_text().removeprefix("gitdir:").strip())
            head, git = (own / "HEAD").read_text().strip(), own / (own / "commondir").read_text().strip()
        else:
            head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        reference = head.removeprefix("ref: ")
        if (git / reference).exists():
            return (git / reference).read_text().strip()
        packed = (git / "packed-refs").read_text().splitlines()
        return next((line.split()[0] for line in packed if line.endswith(f" {reference}")), None)
    except OSError:
        return None
