"""Facts about the machine and the programs, and the CPU time of a process."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import tcmu_replication


def cpu_s(pid: int) -> float:
    """User and system seconds of a process with all its threads, as /proc/PID/stat, but in nanoseconds.

    The clock's number is what clock_getcpuclockid(3) makes of a process id.
    """
    return time.clock_gettime((~pid << 3) | 2)


def cpu_of(pids: Sequence[int]) -> float:
    """The seconds of several processes together."""
    return sum(map(cpu_s, pids))


def peak_memory_mib(pid: int) -> float:
    """The most memory that a process has had resident (VmHWM)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise LookupError(f"process {pid} has no memory")


def facts() -> dict[str, object]:
    """What a reader needs to know to compare the figures with others."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "processor": _processor(),
        "processors": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "tcmu-replication": tcmu_replication.__version__,
        "revision": _first_line("git", "describe", "--always", "--dirty"),
        "qemu": _first_line("qemu-system-x86_64", "--version"),
        "fio": _first_line("fio", "--version"),
        "load": os.getloadavg()[0],
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _first_line(*command: str) -> str:
    """The first line that a program says, "" if it is missing or fails."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return ""
    return said.stdout.partition("\n")[0]
