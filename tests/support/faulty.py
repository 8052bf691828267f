"""tcmu-replication whose media fail: `python -m tests.support.faulty ARGUMENTS`, as `python -m tcmu_replication`.

What fails stands in the file `faults` beside the worker's own directories, looked at anew at each call: lines of a
call, the last part of a path and an errno: `fdatasync disk.img EIO`. `write` and `read` stand for every call that
does that. A call that fails does nothing; a sync that fails has lost what it was to keep only as far as a test sees
to it.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tcmu_replication.block import space
from tcmu_replication.cli.main import main
from tests.support.processes import Worker

CALLS = {
    "read": ("pread", "preadv"),
    "write": ("pwrite", "pwritev"),
    "sync": ("fdatasync", "fsync"),
    "open": ("open",),
}
"""What a line of the file may name, and the functions of `os` that it means."""


def break_medium(worker: Worker, *faults: str) -> None:
    """From now on these calls of a worker fail, which `install` has prepared; none without any."""
    new = worker.directory / "faults.new"
    new.write_text("\n".join(faults))
    new.rename(worker.directory / "faults")


def install(worker: Worker) -> None:
    """Start `worker` so that its medium can be broken, from its next start on."""
    break_medium(worker)
    worker.module = "tests.support.faulty"


def _failing(call: Callable[..., Any], kind: str, rules: Path) -> Callable[..., Any]:
    def failing(where: Any, *arguments: Any, **options: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{where}") if isinstance(where, int) else os.fspath(where)
        for rule in rules.read_text().splitlines():
            named, ending, code = rule.split()
            if named == kind and str(path).endswith(ending):
                raise OSError(getattr(errno, code), f"injected into {kind}")
        return call(where, *arguments, **options)

    return failing


def _prepare(rules: Path) -> None:
    for kind, names in CALLS.items():
        for name in names:
            setattr(os, name, _failing(getattr(os, name), kind, rules))
    space.fallocate = _failing(space.fallocate, "write", rules)


if __name__ == "__main__":
    config = next(word for word in sys.argv if word.startswith("--config="))
    _prepare(Path(config.removeprefix("--config=")).parent / "faults")
    main()
