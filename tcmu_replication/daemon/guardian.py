"""Answers for a worker whose loop is stuck: a thread that sleeps while all is well.

A disk that hangs does not let go of the thread that asked it (fsfreeze, a
suspended device-mapper device, a lost path: not even SIGKILL ends such a wait),
and the loop asks disks in its own thread, for anything else would cost every
request more than the disk does. The loop says twice a second that it turns.
When it does not, this thread

- answers the rings' overdue commands BUSY, so that no initiator gets an error;
- takes the connections to the control socket: `status` and `errors` say which
  call hangs and for how long, any other command is refused with that reason, at
  once and for certain, and none is left lying about to be carried out later;
- tells the manager that the worker lives, while SIGKILL could not end it.

It knows a hang from a busy processor by what the kernel says: the loop's thread
does not run, and has run nothing of its own since the last look. The chain is not touched from here. When the disk
goes on the loop goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

from tcmu_replication.block.file import File
from tcmu_replication.block.offload import Offload
from tcmu_replication.control import schema
from tcmu_replication.control.server import Handler, Server
from tcmu_replication.control.session import Session
from tcmu_replication.errors import Error, Kind
from tcmu_replication.frontend.tcmu import TcmuFrontend
from tcmu_replication.host import systemd, task

log = logging.getLogger(__name__)

TURN_S = 0.5
"""How often the loop says that it turns, and how often this thread looks."""
LATE_S = 1.0
"""A loop that has not turned for so long may be stuck: its rings are looked after."""
REFUSE_S = 3.0
"""A stuck loop is waited for so long before a command is refused: a slow disk is not one that hangs."""
SLOW_S = 5.0
"""A call in a thread is worth a word after that."""

Commands = Mapping[str, Handler]


class Hang(NamedTuple):
    """The loop's thread sits in the kernel `since_s` (time.monotonic). `deaf`: it could not even be killed."""

    since_s: float
    doing: str
    deaf: bool

    def __str__(self) -> str:
        return words(time.monotonic() - self.since_s, self.doing)


def words(seconds: float, doing: str) -> str:
    """The sentence for an operator."""
    return f"no answer for {seconds:.0f} s: {doing}"


class Guardian:
    """Of the worker `name` on the running loop: its `frontends`, and the `commands` of its `control` server.

    `defect` hears of an exception that is a bug.
    """

    def __init__(
        self,
        name: str,
        frontends: Mapping[str, TcmuFrontend],
        control: Server,
        commands: Commands,
        defect: Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None],
    ) -> None:
        self.name = name
        self._hang: Hang | None = None
        self._frontends = frontends
        self._control = control
        self._commands = commands
        self._defect = defect
        self._loop = asyncio.get_running_loop()
        self._thread, self._task = threading.get_ident(), task.this()
        self._turned_s = time.monotonic()
        self._seen: task.Task | None = None
        self._turning: asyncio.TimerHandle | None = None
        self._stand_in: Server | None = None
        self._under_way = 0
        self._answered = 0
        self._own_loop: asyncio.AbstractEventLoop | None = None
        self._over = asyncio.Event()  # on that loop
        self._guard = threading.Thread(target=self._main, name="guardian", daemon=True)

    def start(self) -> None:
        """Watch from now on, until `stop`."""
        self._turn()
        self._own_loop = asyncio.new_event_loop()
        self._guard.start()

    async def stop(self) -> None:
        """End the thread. Twice is fine."""
        if self._turning is not None:
            self._turning.cancel()
        if self._own_loop is not None and self._guard.is_alive():
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                self._own_loop.call_soon_threadsafe(self._over.set)
            await asyncio.to_thread(self._guard.join)

    @property
    def hang(self) -> Hang | None:
        """What the loop is stuck in; None as soon as it turns again. From any thread."""
        hang = self._hang
        return hang if hang is not None and hang.since_s == self._turned_s else None

    def hangs(self, offload: Offload | None) -> str | None:
        """In words: what the loop is stuck in, or a call of `offload` that takes long. From any thread."""
        if (hang := self.hang) is not None:
            return str(hang)
        oldest = None if offload is None else offload.oldest()
        if oldest is None:
            return None
        seconds = time.monotonic() - oldest.since_s
        return words(seconds, oldest.doing) if seconds >= SLOW_S else None

    def _turn(self) -> None:
        """On the loop. The manager ends a worker that it has not heard for some seconds (daemon.child)."""
        self._turned_s = time.monotonic()
        systemd.notify(WATCHDOG=1)
        self._turning = self._loop.call_later(TURN_S, self._turn)

    # --- the other thread

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=self._loop_of_its_own) as runner:
                runner.run(self._watch())
        except Exception as error:
            self._defect(self._loop, {"message": "the guardian failed", "exception": error})

    def _loop_of_its_own(self) -> asyncio.AbstractEventLoop:
        assert self._own_loop is not None
        return self._own_loop

    async def _watch(self) -> None:
        while not await self._is_over():
            self._look()
            if self.hang is not None and self._stand_in is None:
                self._take_connections()
            elif self.hang is None and self._stand_in is not None and not self._under_way:
                await self._end_connections()
        if self._stand_in is not None:
            await self._end_connections()

    async def _is_over(self) -> bool:
        """Sleep, until the next look or the end."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), TURN_S)
        return self._over.is_set()

    def _look(self) -> None:
        """How is the loop? Do for its rings what it does not."""
        if time.monotonic() - self._turned_s < LATE_S:
            self._seen = None
            if self._hang is not None:
                self._goes_on(self._hang)
            return
        for frontend in list(self._frontends.values()):
            self._answered += frontend.stand_in()
        before, self._seen = self._seen, task.look(self._task)
        now = self._seen
        if now is None or now.runs or before is None or (self._hang is None and now.used != before.used):
            return
        began = self._hang is None
        doing = _doing(sys._current_frames().get(self._thread))
        hang = self._hang = Hang(self._turned_s, doing, now.state == "D")
        if began:
            self._say(logging.ERROR, f"the worker is stuck, {hang}")
        if hang.deaf:
            systemd.notify(WATCHDOG=1, STATUS=str(hang))

    def _goes_on(self, hang: Hang) -> None:
        self._hang = None
        answered, self._answered = self._answered, 0
        self._say(
            logging.WARNING,
            f"the worker goes on after {time.monotonic() - hang.since_s:.0f} s ({hang.doing}); "
            f"{answered} commands were answered BUSY meanwhile",
        )

    def _say(self, level: int, text: str) -> None:
        """In the log, which may hang likewise: then only the thread of this line does."""
        threading.Thread(target=log.log, args=(level, "%s: %s", self.name, text), daemon=True).start()

    # --- the control socket

    def _take_connections(self) -> None:
        known = {name: partial(self._command, name) for name in self._commands}
        with contextlib.suppress(OSError):  # no descriptor left: tried again at the next look
            self._stand_in = self._control.stand_in(known)

    async def _end_connections(self) -> None:
        server, self._stand_in = self._stand_in, None
        if server is not None:
            await server.close()

    async def _command(self, name: str, arguments: Any, session: Session) -> Any:
        """Answer from memory, refuse, or hand on to a loop that has come back."""
        if (hang := self.hang) is not None and name == "query-status":
            return await self._commands[name](arguments, session)  # never awaits
        if hang is not None and name == "query-errors":
            return schema.ErrorStatus(error=True, desc=str(hang))
        self._under_way += 1
        try:
            while (hang := self.hang) is not None:
                if time.monotonic() - hang.since_s >= REFUSE_S:
                    raise Error(Kind.IO, f"{hang}. The command was not carried out")
                await asyncio.sleep(TURN_S / 5)
            done = asyncio.run_coroutine_threadsafe(
                _coroutine(self._commands[name], arguments, session), self._loop
            )
            return await asyncio.wrap_future(done)
        finally:
            self._under_way -= 1


async def _coroutine(handler: Handler, arguments: Any, session: Session) -> Any:
    return await handler(arguments, session)


def _doing(frame: FrameType | None) -> str:
    """What a thread is at: "write /dev/sdb" where a path is known, else the innermost function."""
    innermost = "an unknown call"
    known = False
    while frame is not None:
        me, path = frame.f_locals.get("self"), frame.f_locals.get("path")
        name = frame.f_code.co_name.lstrip("_")
        if isinstance(me, File):
            return f"{name} {me.path}"
        if isinstance(path, str):
            return f"{name} {path}"
        if not known:
            innermost, known = f"{frame.f_globals.get('__name__')}.{name}", True
        frame = frame.f_back
    return innermost
