"""A worker that does what the test tells it: `python fake_worker.py ARGUMENTS`, with FAKE_HUB in the environment.

It connects to the hub, says its process and its arguments, and obeys lines:
    ready            tell the manager that it serves
    words TEXT       tell the manager a STATUS
    alive            tell the manager a sign of life, the only one
    exit N           end with status N
    deaf             ignore SIGTERM
    hold PATH        take the lock beside a control socket
    serve PATH       take the lock and answer attach-device and detach-device, telling the hub
    refuse TEXT      from now on refuse every attach-device
    accept           refuse no more
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from tcmu_replication.control import lock
from tcmu_replication.control.server import Server
from tcmu_replication.errors import Error, Kind
from tcmu_replication.host import systemd


async def main() -> None:
    reader, writer = await asyncio.open_unix_connection(os.environ["FAKE_HUB"])

    def say(message: Any) -> None:
        writer.write(json.dumps(message).encode() + b"\n")

    refusals = [Error(Kind.NOT_FOUND, "not enabled yet")]

    always: list[Error] = []

    async def attach(arguments: Any, session: object) -> None:
        if always:
            raise always[0]
        if refusals:
            raise refusals.pop()
        say(["attach", arguments.device])

    async def detach(arguments: Any, session: object) -> None:
        say(["detach", arguments.device])

    say({"pid": os.getpid(), "arguments": sys.argv[1:]})
    while line := (await reader.readline()).decode().strip():
        verb, _, rest = line.partition(" ")
        match verb:
            case "ready":
                systemd.notify(READY=1)
            case "alive":
                systemd.notify(WATCHDOG=1)
            case "words":
                systemd.notify(STATUS=rest)
            case "exit":
                os._exit(int(rest))
            case "deaf":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            case "refuse":
                always[:] = [Error(Kind.BAD_CONFIG, rest)]
            case "accept":
                always.clear()
            case "hold":
                lock.hold(Path(rest))
            case "serve":
                await Server({"attach-device": attach, "detach-device": detach}).listen_unix(Path(rest))
        say("done")


if __name__ == "__main__":
    asyncio.run(main())
