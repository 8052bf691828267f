"""Our secondary as a user has it: `tcmu-replication serve`, its LUN and its link over NBD, its control socket."""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Sequence
from pathlib import Path

from tcmu_replication.control.client import Client
from tcmu_replication.errors import Error
from tcmu_replication.replication.stages import Stage
from tests.interop.differential import steps
from tests.interop.differential.sides import NbdDoors, Outcome, make_image
from tests.interop.differential.steps import LENGTH, Command, Fault, Request
from tests.support import nbd, qemu
from tests.support.processes import Pair


class ProcessSide:
    """Ours, in a process of its own. It has no faults and no start in the other mode."""

    def __init__(self, directory: Path, sequence: steps.Sequence) -> None:
        assert sequence.fault is Fault.NONE
        self._worker = Pair(directory, size=LENGTH, link={"trust": "address"}, durable=sequence.durable).beta
        make_image(self._worker.disk)
        file = tomllib.loads((self._worker.directory / "etc/disk0.toml").read_text())
        self._port = file["link"]["port"]
        self._stack = contextlib.ExitStack()

    async def open(self) -> None:
        """Begin."""
        self._stack.callback(self._worker.stop)
        self._start()

    def _start(self) -> None:
        self._worker.start()
        self._control = self._stack.enter_context(Client.unix(self._worker.directory / "run/disk0.sock"))
        self._doors = NbdDoors(nbd.Nbd(str(self._worker.socket), "disk0"))
        self._stack.callback(self._doors.close)
        self._connect()

    async def close(self) -> None:
        """End."""
        self._stack.close()

    @property
    def stage(self) -> Stage:
        """As `query-status` tells it."""
        return Stage(self._execute("query-status")["stage"])

    def _execute(self, command: str, **arguments: object) -> dict[str, str]:
        return self._control.execute(command, arguments, qemu.PATIENCE_S)

    async def command(self, command: Command) -> str | None:
        """See `Side`."""
        try:
            return self._command(command)
        except Error as error:
            return str(error)

    def _command(self, command: Command) -> str | None:
        match command:
            case Command.START:
                self._execute("xen-set-replication", enable=True, primary=False)
                self._connect()
            case Command.CHECKPOINT:
                self._execute("xen-colo-do-checkpoint")
            case Command.GET_ERROR:
                # QEMU's sentence; the reason follows it.
                return self._execute("query-errors").get("desc", "").partition(": ")[0] or None
            case Command.STOP:
                self._execute("stop-replication")
                self._doors.end_forwarding()
            case Command.FAILOVER:
                self._execute("failover", to="checkpoint", force=True)
                self._doors.end_forwarding()
            case Command.SETTLE:
                qemu.until(lambda: self.stage is not Stage.FAILOVER, "the end of the commit")
            case Command.RESTART:
                self._doors.end_forwarding()
                if self.stage is Stage.RUNNING:
                    self._execute("stop-replication")
                self._execute("start", **{"discard-my-data": True})
                self._connect()
            case Command.REOPEN:
                self._worker.kill()
                self._doors.close()
                self._control.close()
                self._start()
            case _:
                raise AssertionError(f"{command} has no command of ours")
        return None

    def _connect(self) -> None:
        """As the primary would: from its address, where replication runs."""
        if self._doors.forward is None and self.stage is Stage.RUNNING:
            self._doors.forward = nbd.Nbd(("127.0.0.2", self._port), "disk0")

    async def requests(self, requests: Sequence[Request]) -> list[Outcome]:
        """See `Side`."""
        return self._doors.requests(requests)

    async def top(self) -> list[bytes | None]:
        """See `Side`."""
        return self._doors.top(Fault.NONE)

    def disk(self) -> bytes:
        """See `Side`."""
        return self._worker.disk.read_bytes()
