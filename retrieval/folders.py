"""A folder that is whole or absent: how stores, indexes, leak lists and selections reach the disk.

It is built under a hidden name beside its place, synced, given its manifest.json last, and renamed. So a folder with a
manifest is complete, and what a killed process leaves is not taken for one. A lock lets one process build while others
wait for it. The manifest holds the size of every file, which tells a truncated copy without reading it through. What a
file has beyond that size is not there yet: so a folder is extended by appending to its files, the manifest last.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tasks.errors import InputError

MANIFEST = "manifest.json"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last: a limit on the size of a file


def ensure(folder: Path, kind: str, version: int, write: Callable[[Path], dict]) -> dict:
    """The manifest of `folder`, which is built by `write(temporary folder) -> manifest entries` if it is not there.

    The manifest also has what it took: `seconds`, unless `write` gives its own. Raises InputError where the folder is
    damaged, is of another kind or version, or the disk is full.
    """
    manifest = load(folder, kind, version)
    if manifest is not None:
        return manifest
    with _named_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            manifest = load(folder, kind, version)  # another process may have built it while we waited
            if manifest is None:
                manifest = _build(folder, {"format": kind, "version": version}, write)
    return manifest


def load(folder: Path, kind: str, version: int) -> dict | None:
    """The manifest of a complete folder, None where there is none. Raises InputError as `ensure` does."""
    mend = f"delete {folder} and it is made again"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise InputError(f"{folder / MANIFEST} is not JSON; {mend}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != kind:
        raise InputError(f"{folder} is not a {kind}: its {MANIFEST} does not say so")
    if manifest.get("version") != version:
        raise InputError(f"{folder} has version {manifest.get('version')}, this program reads {version}; {mend}")
    for name, size in manifest["files"].items():
        found = (folder / name).stat().st_size if (folder / name).exists() else "no"
        if found == "no" or found < size:
            raise InputError(f"{kind} {folder} is damaged: {name} has {found} bytes instead of {size}; {mend}")
    return manifest


def extend(folder: Path, kind: str, version: int, write: Callable[[], dict]) -> dict:
    """The new manifest of `folder`, to whose files `write() -> manifest entries` appends.

    Until the manifest is replaced the folder is what it was: what a killed extension left is cut off by the next one.
    Raises InputError as `ensure` does, and where there is no such folder.
    """
    with _named_errors(folder):
        if not holds(folder, kind):
            raise InputError(f"{folder} is not a {kind}: it has no {MANIFEST} that says so")
        with _locked(folder):
            manifest = load(folder, kind, version)
            _cut(folder, manifest)
            try:
                new = manifest | write()
                new["files"] = {name: (folder / name).stat().st_size for name in manifest["files"]}
                for name in manifest["files"]:
                    sync(folder / name)
                half = folder / f".{MANIFEST}"
                half.write_text(json.dumps(new, indent=1) + "\n")
                sync(half)
            except BaseException:
                _cut(folder, manifest)
                raise
            half.replace(folder / MANIFEST)
            sync(folder)
    return new


def _cut(folder: Path, manifest: dict) -> None:
    for name, size in manifest["files"].items():
        os.truncate(folder / name, size)


def holds(folder: Path, kind: str) -> bool:
    """Whether `folder` claims to be of this kind, complete or not."""
    try:
        return json.loads((folder / MANIFEST).read_text())["format"] == kind
    except (OSError, ValueError, KeyError, TypeError):
        return False


def key(**parts: object) -> str:
    """A folder's name from all that decides its content (anything JSON can hold)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _build(folder: Path, head: dict, write: Callable[[Path], dict]) -> dict:
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    temporary.mkdir()
    start = time.perf_counter()
    try:
        manifest = head | {"seconds": None} | write(temporary)
        manifest["seconds"] = manifest["seconds"] or round(time.perf_counter() - start, 3)
        files = sorted(path for path in temporary.iterdir())
        manifest["files"] = {path.name: path.stat().st_size for path in files}
        for path in files:
            sync(path)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        sync(temporary / MANIFEST)
        sync(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # without a manifest, or `load` would have returned it
        os.replace(temporary, folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return manifest


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock file beside `folder`; the system frees it when its process ends, however that happens."""
    path = folder.with_name(f".{folder.name}.lock")
    while True:
        file = path.open("w")
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # its last holder removed the file while we waited
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


@contextmanager
def _named_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (None, *NO_ROOM, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        reason = error.strerror or os.strerror(errno.ENOSPC)  # NumPy says but that it wrote less than it wanted
        raise InputError(f"{folder} cannot be written ({reason}); free some space or name another place") from error
