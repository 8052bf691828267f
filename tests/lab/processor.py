"""What a user-mode kernel needs on the processor of this machine; see ptrace.c."""

from __future__ import annotations

import functools
import pathlib
import subprocess
import tempfile

SOURCE = pathlib.Path(__file__).with_name("ptrace.c")
LARGE_STATE = "amx_tile"
"""The flag of /proc/cpuinfo of a processor whose state is larger than the kernel's buffer."""


@functools.cache
def environment() -> dict[str, str]:
    """What the environment of a kernel has besides ours. Raises CalledProcessError if it cannot be made."""
    if LARGE_STATE not in pathlib.Path("/proc/cpuinfo").read_text().split():
        return {}
    library = _folder() / "ptrace.so"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, SOURCE], check=True)
    return {"LD_PRELOAD": str(library)}


@functools.cache
def _folder() -> pathlib.Path:
    folder = tempfile.TemporaryDirectory(prefix="lab-processor-")
    _kept.append(folder)
    return pathlib.Path(folder.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []
"""Removed when this process ends."""
