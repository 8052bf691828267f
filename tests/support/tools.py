"""Programs that tests borrow: skip where one is missing, start and stop servers."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest


def requires(*programs: str) -> pytest.MarkDecorator:
    """Skip a test, naming what is missing, unless all `programs` are installed."""
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


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


@asynccontextmanager
async def server(*command: str, socket: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a server until it has made `socket`, and kill it in the end."""
    process = await asyncio.create_subprocess_exec(*command)
    try:
        async with asyncio.timeout(20):
            while not socket.exists():
                assert process.returncode is None, f"{command} ended with {process.returncode}"
                await asyncio.sleep(0.01)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
