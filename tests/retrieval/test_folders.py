import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retrieval import folders
from tasks.errors import InputError

BUILDER = """
import sys, time
from pathlib import Path
from retrieval import folders

def write(place):
    (place / "data").write_text("x" * 1000)
    (Path(sys.argv[1]) / f"built-{sys.argv[2]}").touch()
    time.sleep(float(sys.argv[3]))
    return {"by": sys.argv[2]}

print(folders.ensure(Path(sys.argv[1]) / "folder", "thing", 1, write)["by"])
"""


def write(place: Path) -> dict:
    (place / "data").write_text("x" * 1000)
    return {"entry": 3}


def start_builder(place: Path, name: str, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILDER, str(place), name, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_builds_once_and_leaves_nothing_else(tmp_path):
    folder = tmp_path / "deep" / "folder"
    manifest = folders.ensure(folder, "thing", 1, write)
    assert manifest == json.loads((folder / "manifest.json").read_text())
    assert manifest | {"seconds": 0} == {
        "format": "thing", "version": 1, "seconds": 0, "entry": 3, "files": {"data": 1000},
    }  # fmt: skip
    assert folders.ensure(folder, "thing", 1, None) == manifest
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]
    assert folders.holds(folder, "thing")
    assert not folders.holds(folder, "other")
    assert not folders.holds(tmp_path, "thing")


def test_what_fails_half_way_leaves_nothing(tmp_path):
    def fail(place: Path) -> dict:
        (place / "data").write_text("half")
        raise ValueError("broken off")

    with pytest.raises(ValueError, match="broken off"):
        folders.ensure(tmp_path / "folder", "thing", 1, fail)
    assert not list(tmp_path.iterdir())


NUMPY_ON_A_FULL_DISK = OSError("34318 requested and 0 written")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (NUMPY_ON_A_FULL_DISK, "No space left on device"),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), "File too large"),
    ],
)
def test_full_disk_is_one_sentence_and_leaves_nothing(error, reason, tmp_path):
    def fail(place: Path) -> dict:
        (place / "data").write_text("half")
        raise error

    with pytest.raises(InputError, match=rf"cannot be written \({reason}\); free some space"):
        folders.ensure(tmp_path / "folder", "thing", 1, fail)
    assert not list(tmp_path.iterdir())


def test_killed_in_the_middle_then_built_again(tmp_path):
    builder = start_builder(tmp_path, "first", 60)
    wait_for(tmp_path / "built-first")
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    assert (tmp_path / ".folder.tmp" / "data").exists()
    assert folders.load(tmp_path / "folder", "thing", 1) is None
    folders.ensure(tmp_path / "folder", "thing", 1, write)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["built-first", "folder"]


def test_a_second_process_waits_for_the_first(tmp_path):
    first = start_builder(tmp_path, "first", 1)
    wait_for(tmp_path / "built-first")
    second = start_builder(tmp_path, "second", 0)
    assert [process.communicate(timeout=30)[0] for process in (first, second)] == ["first\n", "first\n"]
    assert not (tmp_path / "built-second").exists()


def test_folder_without_manifest_is_replaced(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "stale").touch()
    folders.ensure(folder, "thing", 1, write)
    assert sorted(path.name for path in folder.iterdir()) == ["data", "manifest.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "data").write_text("x"), "data has 1 bytes instead of 1000; delete"),
        (lambda f: (f / "data").unlink(), "data has no bytes instead of 1000; delete"),
        (lambda f: (f / "manifest.json").write_text('{"form'), "manifest.json is not JSON; delete"),
        (lambda f: (f / "manifest.json").write_text('{"format": "other"}'), "is not a thing"),
        (lambda f: (f / "manifest.json").write_text("[]"), "is not a thing"),
        (
            lambda f: (f / "manifest.json").write_text('{"format": "thing", "version": 9}'),
            "has version 9, this program reads 1; delete",
        ),
    ],
)
def test_damaged_folders_are_named(change, message, tmp_path):
    folder = tmp_path / "folder"
    folders.ensure(folder, "thing", 1, write)
    change(folder)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        folders.ensure(folder, "thing", 1, write)
    assert str(folder) in str(error.value)


def test_key_depends_on_every_part():
    assert folders.key(a=1, b="x") == folders.key(b="x", a=1)
    assert len({folders.key(a=1), folders.key(a=2), folders.key(b=1), folders.key(a="1")}) == 4
