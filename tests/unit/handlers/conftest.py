"""Both ends of a resource in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes import free_port
from tests.support.tools import PATIENCE_S
from tests.unit.handlers.ends import SIZE, End, Story


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., None]:
    """Open both ends, replicate, run a story of (primary, secondary), and close them.

    Keywords change [link].
    """
    # An end that has gone is not waited for when the other closes.
    link = {"port": free_port(), "control-port": free_port(), "reconnect-delay": 0.1, "timeout": 20.0}

    def describe(**changes: float) -> None:
        lines = ["[resource]", 'name = "disk0"', f"size = {SIZE}", "[link]"]
        lines += ['trust = "address"', *(f"{name} = {value}" for name, value in (link | changes).items())]
        for host, mode, address in (("alpha", "primary", "127.0.0.1"), ("beta", "secondary", "127.0.0.2")):
            lines += [f"[host.{host}]", f'mode = "{mode}"', f'address = "{address}"']
            lines += [f'disk = "{tmp_path}/{host}/disk.img"', f'overlays = "{tmp_path}/{host}/overlays"']
        (tmp_path / "disk0.toml").write_text("\n".join(lines))

    async def whole(story: Story, started: bool, **changes: float) -> None:
        describe(**{name.replace("_", "-"): value for name, value in changes.items()})
        alpha, beta = End(tmp_path, "alpha"), End(tmp_path, "beta")
        await beta.open()
        await alpha.open()
        try:
            async with asyncio.timeout(PATIENCE_S):
                if started:
                    await beta.ask("start")
                    await alpha.ask("start", assume_clean=True)
                await story(alpha, beta)
        finally:
            await alpha.close()
            await beta.close()

    return lambda story, started=True, **link: asyncio.run(whole(story, started, **link))
