"""One worker process under the manager's eye: start, watch, start again, stop.

Its end is seen through a pidfd, so that no thread and no signal handler is
needed. A worker that outlived an earlier manager is taken over by the lock
beside its control socket: a new manager stalls no LUN.

A worker says every half second that it lives (WATCHDOG=1), also while a disk
holds its loop, for then SIGKILL could not end it and its guardian answers. One
that has said so once and falls silent is killed: stopped, or in an endless loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from tcmu_replication.control import lock
from tcmu_replication.control.schema import WorkerInfo
from tcmu_replication.daemon.restarts import Restarts

State = Literal["starting", "running", "hung", "waiting", "stopping", "stopped", "failed"]

log = logging.getLogger(__name__)

HOPELESS = (2,)
"""Exit statuses that another try will not change soon: wrong usage or configuration (cli.exits)."""
SILENT_LOOKS = 8
"""So many looks without a word and it is killed. With a start after it that is well below 20 s, when a ring's
commands would be answered BUSY, and 30 s, when the kernel makes errors of them; and longer than a busy machine lets
a process wait for its turn."""
LOOK_S = 1.0
"""Counted in looks, not by a clock: a manager that was stopped itself accuses nobody."""
STOP_S = 30.0
"""More than a worker's own limit for commands under way; then it is killed, which loses nothing acknowledged."""


class Child:
    """The worker `name`, run as `arguments` with `environment`; `socket` is its control socket.

    `ready` is called each time it says that it serves, `listen` before its end
    is judged: it hands over what it had said (`said`), its last words above all.
    `ended` is called when its process has ended, however that was. `down` is
    called when it serves no more against its will: it has the kernel answer for
    the worker's devices, and says whether there are any.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        socket: Path,
        restarts: Restarts,
        ready: Callable[[Child], None],
        listen: Callable[[], None],
        ended: Callable[[Child], None],
        down: Callable[[Child], bool],
        look_s: float = LOOK_S,
    ) -> None:
        self.name = name
        self.state: State = "stopped"
        self.error: str | None = None
        self.down_since: str | None = None
        self.pid: int | None = None
        self.restarts = restarts
        self._arguments = list(arguments)
        self._environment = dict(environment)
        self._socket = socket
        self._ready = ready
        self._listen = listen
        self._tell_end = ended
        self._down = down
        self._look_s = look_s
        self._silent: int | None = None  # looks since its last word; None before its first
        self._looking: asyncio.TimerHandle | None = None
        self._words: str | None = None
        self._loop = asyncio.get_running_loop()
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._started_s = 0.0
        self._retry: asyncio.TimerHandle | None = None
        self._gone = asyncio.Event()
        self._gone.set()

    def info(self) -> WorkerInfo:
        """The row of query-workers."""
        return WorkerInfo(
            name=self.name,
            state=self.state,
            pid=self.pid,
            restarts=self.restarts.count,
            error=self.error,
            down_since=self.down_since,
        )

    def start(self) -> None:
        """Start it, or take over the one that serves already. Does nothing if it runs."""
        if self.pid is not None or self.state == "stopping":
            return
        self._cancel_retry()
        self._started_s = self._loop.time()
        if not self._adopt():
            self._spawn()

    def said(self, message: Mapping[str, str]) -> None:
        """What it told its service manager (sd_notify(3))."""
        self._words = message.get("STATUS", self._words)
        if message.get("WATCHDOG") == "1":
            self._silent = 0
        if message.get("READY") == "1" and self.state == "starting":
            self._serves()

    async def stop(self, limit_s: float = STOP_S) -> None:
        """End it in order, with SIGTERM; after `limit_s` with SIGKILL. Returns when it is gone."""
        self._cancel_retry()
        self.terminate()
        try:
            async with asyncio.timeout(limit_s):
                await self._gone.wait()
        except TimeoutError:
            log.error("%s: did not end in %g s and is killed", self.name, limit_s)
            self._signal(signal.SIGKILL)
            await self._gone.wait()
        self.state = "stopped"

    def terminate(self) -> None:
        """Ask it to end; `stop` waits for it."""
        self._cancel_retry()
        if self.pid is not None and self.state != "stopping":
            self.state = "stopping"
            self._signal(signal.SIGTERM)

    def _spawn(self) -> None:
        try:
            self._process = subprocess.Popen(
                self._arguments,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                process_group=0,  # a Ctrl-C on the terminal is for us to pass on in order
            )
        except OSError as error:
            self._words = None
            self._died(f"cannot be started: {error}", hopeless=False)
            return
        self.state = "starting"
        self._words = None
        self._watch(self._process.pid)
        log.info("%s: started, process %d", self.name, self._process.pid)

    def _adopt(self) -> bool:
        pid = lock.holder(self._socket)
        if pid is None:
            return False
        try:
            self._watch(pid)
        except ProcessLookupError:
            return False
        log.info("%s: is served already, process %d", self.name, pid)
        self._serves()
        return True

    def _watch(self, pid: int) -> None:
        self._pidfd = os.pidfd_open(pid)
        self.pid = pid
        self._gone.clear()
        self._loop.add_reader(self._pidfd, self._ended)
        self._silent = None
        self._looking = self._loop.call_later(self._look_s, self._look)

    def _look(self) -> None:
        """Has it said a word since the last look? What waits to be read counts."""
        self._looking = self._loop.call_later(self._look_s, self._look)
        self._listen()
        if self._silent is None or self.state == "stopping":
            return
        self._silent += 1
        if self._silent == SILENT_LOOKS:
            self._words = f"it hung: no sign of life for {SILENT_LOOKS * self._look_s:.0f} s"
            log.error("%s: process %s is killed, %s", self.name, self.pid, self._words)
            self.down_since = self.down_since or _now()
            self._signal(signal.SIGKILL)
        elif self._silent == SILENT_LOOKS + 1:
            self.state = "hung"
            self.error = f"{self._words}, and SIGKILL does not end it: a disk hangs"
            log.error("%s: process %s: %s", self.name, self.pid, self.error)
            self._down(self)

    def _serves(self) -> None:
        self.state = "running"
        self.error = None
        self.down_since = None
        self._ready(self)

    def _ended(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        if self._looking is not None:
            self._looking.cancel()
        self._listen()
        process, self._process = self._process, None
        pid, self.pid = self.pid, None
        status = process.wait() if process is not None else None
        self._gone.set()
        self._tell_end(self)
        if self.state == "stopping":
            return
        if status == 0:
            log.info("%s: process %d has ended as it was told", self.name, pid)
            self.state = "stopped"
            return
        self._died(f"process {pid} {_how(status)}", hopeless=status in HOPELESS)

    def _died(self, how: str, *, hopeless: bool) -> None:
        waited_for = self._down(self)
        lived_s = self._loop.time() - self._started_s
        delay_s = self.restarts.died(lived_s, hopeless=hopeless and not waited_for)
        log.error(
            "%s: %s; it is started again %s", self.name, how, f"in {delay_s:g} s" if delay_s else "at once"
        )
        self.state = "failed" if hopeless else "waiting"
        self.error = self._words or how
        self.down_since = self.down_since or _now()
        self._retry = self._loop.call_later(delay_s, self.start)

    def _cancel_retry(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    def _signal(self, number: signal.Signals) -> None:
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and the loop is about to tell
                signal.pidfd_send_signal(self._pidfd, number)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _how(status: int | None) -> str:
    if status is None:
        return "has ended"
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"
