"""The C++ kernels, compiled when one is first wanted: seconds, once for a source, a compiler and an instruction set.

A plain shared library, opened by ctypes: it needs no header of torch or Python, so that any C++ compiler will do. Where
there is none, or the processor is another, the twins in torch give the same numbers. `TLM_KERNELS=off` asks for them.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

SOURCES = [Path(__file__).with_name(name) for name in ("linear.cpp", "adamw8bit.cpp")]
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno")
AVX2 = ("-mavx2", "-mfma")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512")
# Best first: the compiler's flags, and what the processor must have, by torch's names.
INSTRUCTION_SETS = {
    "avx512-vnni": (
        (*AVX2, *AVX512),
        ("avx2", "fma3", "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_vnni"),
    ),
    "avx2": (AVX2, ("avx2", "fma3")),
}
# What the functions take: an int, a long or a pointer each.
KINDS = {"i": ctypes.c_int, "l": ctypes.c_long, "p": ctypes.c_void_p}
ARGUMENTS = {"tlm_linear": "iplllppplippppip", "tlm_adamw8bit": "pppppplppi"}
FOLDER = Path("~/.cache/tlm/kernels")


class NoKernels(Exception):
    """Why there are none here, as a part of a sentence."""


def instruction_sets() -> list[str]:
    """Those that the processor has and the kernels know, best first."""
    has = torch.cpu.get_capabilities()
    return [name for name, (_, needs) in INSTRUCTION_SETS.items() if all(has.get(need) for need in needs)]


@functools.cache
def find(instructions: str | None = None) -> ctypes.CDLL | NoKernels:
    """The library for an instruction set (for the best, if none is named), or why there is none. Asked once."""
    try:
        return load(instructions, FOLDER.expanduser())
    except NoKernels as reason:
        if instructions is None and os.environ.get("TLM_KERNELS") != "off":
            print(f"tlm: no CPU kernels ({reason}); torch computes the same numbers, more slowly", file=sys.stderr)
        return reason


def kernels(instructions: str | None = None) -> ctypes.CDLL | None:
    """The library, or None: then the twins must do."""
    found = find(instructions)
    return None if isinstance(found, NoKernels) else found


def load(instructions: str | None, folder: Path) -> ctypes.CDLL:
    """Compiles into `folder` what is not there yet. Processes that want it at once wait for one of them."""
    if os.environ.get("TLM_KERNELS") == "off":
        raise NoKernels("TLM_KERNELS=off")
    available = instruction_sets()
    if not available:
        raise NoKernels("the processor has no AVX2")
    name = instructions or available[0]
    if name not in available:
        raise NoKernels(f"the processor has no {name}")
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")
    if compiler is None:
        raise NoKernels("there is no C++ compiler (g++)")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    flags = (*FLAGS, *INSTRUCTION_SETS[name][0])
    known = hashlib.sha256("\0".join([version, *flags]).encode())
    for source in SOURCES:
        known.update(source.read_bytes())
    library = folder / f"{known.hexdigest()[:24]}.so"
    try:
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"{library.stem}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # let go of by the system, however this process ends
                if not library.exists():
                    compile_to(library, [compiler, *flags, *map(str, SOURCES)], name)
        opened = ctypes.CDLL(str(library))
    except OSError as error:
        raise NoKernels(f"{library}: {error}") from None
    for function, arguments in ARGUMENTS.items():
        getattr(opened, function).argtypes, getattr(opened, function).restype = [KINDS[a] for a in arguments], None
    return opened


def compile_to(library: Path, command: list[str], name: str) -> None:
    """Whole or not at all. Raises NoKernels with the compiler's first complaint."""
    print(f"tlm: compiling the CPU kernels for {name} (once, about 10 s)", file=sys.stderr)
    temporary = library.with_suffix(f".{os.getpid()}")
    done = subprocess.run([*command, "-o", str(temporary)], capture_output=True, text=True, check=False)
    if done.returncode:
        temporary.unlink(missing_ok=True)
        complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise NoKernels(f"{command[0]} cannot compile them ({complaint.strip()})")
    os.replace(temporary, library)
