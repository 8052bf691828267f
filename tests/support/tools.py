"""Programs that tests borrow: skip where one is missing, start and stop servers."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

PATIENCE_S = 240.0
"""How long a test waits for anything that is to come: only what hangs takes so long, on the slowest machine."""
_LISTENING = "00010000"
"""Of the flags in /proc/net/unix: the kernel's __SO_ACCEPTCON."""


def requires(*programs: str) -> pytest.MarkDecorator:
    """Skip a test, naming what is missing, unless all `programs` are installed."""
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def until(found: Callable[[], object], what: str) -> None:
    """Ask again and again until something is `found`; for `what` has no event. A pair's hosts talk once a second."""
    end_s = time.monotonic() + PATIENCE_S
    while not found():
        assert time.monotonic() < end_s, f"waited in vain: {what}"
        time.sleep(0.05)


async def run(*command: str) -> str:
    """The standard output of a command that must succeed."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, err = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        raise
    assert process.returncode == 0, f"{command} ended with {process.returncode}: {out!r} {err!r}"
    return out.decode()


def listens(path: Path) -> bool:
    """Whether somebody takes connections on a unix socket: its file is there a moment before that."""
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return any(row[3] == _LISTENING and row[-1] == str(path) for row in rows)


@asynccontextmanager
async def server(*command: str, socket: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a server that listens on `socket`, or makes that file when it listens; kill it in the end."""
    process = await asyncio.create_subprocess_exec(*command)
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not (socket.is_file() or listens(socket)):
                assert process.returncode is None, f"{command} ended with {process.returncode}"
                await asyncio.sleep(0.01)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
