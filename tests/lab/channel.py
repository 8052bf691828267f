"""The line to a lab host's agent: commands out, their output and exit status back.

The other end is tests/lab/guest/agent.py, whose docstring has the messages.
Any number of commands run at the same time, from any thread.
"""

from __future__ import annotations

import itertools
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

RECEIVE = 1 << 16
PATIENCE_S = 240.0
"""How long anything in a host is waited for: only what hangs takes so long, on the slowest machine."""


class LabError(Exception):
    """A host died, did not boot, or a command in it failed; the message shows what it said."""


class HostDiedError(LabError):
    """The host went away while something waited for it."""


class CommandError(LabError):
    """A command ended with another status than 0, or not in time; `command` is the `Command`."""

    def __init__(self, message: str, command: Command):
        said = "\n".join(part for part in (command.stdout[-2000:], command.stderr[-4000:]) if part)
        super().__init__(f"{message}\n{said}" if said else message)
        self.command = command


class Command:
    """A command inside a host, running or done.

    `returncode` is None until it ended, minus the signal if one ended it.
    `stdout` and `stderr` are what has come so far.
    """

    def __init__(self, channel: Channel, number: int, title: str):
        self.title = title
        self.returncode: int | None = None
        self.seconds = 0.0
        self._channel = channel
        self._number = number
        self._began = time.monotonic()
        self._changed = threading.Condition()
        self._output = {"out": "", "err": ""}
        self._host_died = False

    @property
    def stdout(self) -> str:
        return _text(self._output["out"])

    @property
    def stderr(self) -> str:
        return _text(self._output["err"])

    def wait(self, timeout: float = PATIENCE_S, *, check: bool = True) -> Command:
        """Returns when the command has ended.

        Raises HostDiedError, or CommandError after `timeout` seconds (the command
        is killed then) or, with `check`, on an exit status that is not 0.
        """
        self._await(lambda: self.returncode is not None, timeout, "end")
        if check and self.returncode != 0:
            raise CommandError(f"{self._where()} ended with status {self.returncode}", self)
        return self

    def wait_for(self, text: str, timeout: float = PATIENCE_S) -> Command:
        """Returns when its output, standard or error, contains `text`; raises as `wait` does."""
        self._await(lambda: self._says(text) or self.returncode is not None, timeout, f"say {text!r}")
        if not self._says(text):
            raise CommandError(f"{self._where()} ended ({self.returncode}) without saying {text!r}", self)
        return self

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Sends a signal to the command and all it started."""
        self._channel.send({"id": self._number, "signal": int(number)})

    def _says(self, text: str) -> bool:
        return text in self.stdout or text in self.stderr

    def _await(self, done: Callable[[], bool], timeout: float, what: str) -> None:
        with self._changed:
            in_time = self._changed.wait_for(lambda: self._host_died or done(), timeout)
        if self._host_died and not done():
            raise HostDiedError(f"{self._where()}: the host died before the command ended")
        if not in_time:
            self.signal(signal.SIGKILL)
            raise CommandError(f"{self._where()} did not {what} within {timeout} s", self)

    def _where(self) -> str:
        return f"{self._channel.name}: {self.title}"

    def _take(self, message: dict) -> None:
        """A line of the agent about this command."""
        with self._changed:
            for name in ("out", "err"):
                self._output[name] += message.get(name, "")
            if "exit" in message:
                self.returncode = message["exit"]
                self.seconds = time.monotonic() - self._began
            self._changed.notify_all()

    def _lose_host(self) -> None:
        with self._changed:
            self._host_died = True
            self._changed.notify_all()


def _text(raw: str) -> str:
    """Output as text: the agent cuts it anywhere, also inside a character."""
    return raw.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class Channel:
    """Our end of a host's serial line. `log` gets every command and its end, as text lines."""

    def __init__(self, name: str, line: socket.socket, log: Callable[[str], None]):
        self.name = name
        self.ready = threading.Event()
        """Set when the agent serves."""
        self.lost = threading.Event()
        """Set when the line is at its end: the host is dead."""
        self._line = line
        self._log = log
        self._numbers = itertools.count(1)
        self._commands: dict[int, Command] = {}
        self._lock = threading.Lock()  # guards _commands and whole lines on the socket
        self._reader = threading.Thread(target=self._read, name=f"lab-{name}", daemon=True)
        self._reader.start()

    def start(self, title: str, request: dict) -> Command:
        """Starts what `request` says ("run" or "python"); `title` is what messages call it."""
        number = next(self._numbers)
        command = Command(self, number, title)
        with self._lock:
            self._commands[number] = command
        self._log(f"[{number}] $ {title}")
        self.send({"id": number, **request})
        if self.lost.is_set():
            command._lose_host()
        return command

    def send(self, message: dict) -> None:
        try:
            with self._lock:
                self._line.sendall(json.dumps(message).encode() + b"\n")
        except OSError as e:
            raise HostDiedError(f"{self.name}: the host is not running") from e

    def close(self) -> None:
        """After the host's end: what still waits for it raises HostDiedError."""
        self._line.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._line.close()

    def _read(self) -> None:
        for line in _lines(self._line):
            try:
                message = json.loads(line)
            except ValueError:
                self._log(f"not the agent's: {line!r}")
                continue
            if "ready" in message:
                self.ready.set()
                continue
            self._hear(message)
        self.lost.set()
        self.ready.set()  # whoever waits looks at `lost` first
        with self._lock:
            commands = list(self._commands.values())
        for command in commands:
            command._lose_host()

    def _hear(self, message: dict) -> None:
        number = message["id"]
        with self._lock:
            command = self._commands.pop(number) if "exit" in message else self._commands[number]
        command._take(message)
        for name in ("out", "err"):
            if name in message:
                said = _text(message[name]).splitlines()
                self._log("\n".join(f"[{number}] {name}: {line}" for line in said))
        if "exit" in message:
            self._log(f"[{number}] ended with {message['exit']} after {command.seconds:.2f} s")


def _lines(line: socket.socket) -> Iterator[bytes]:
    received = b""
    while True:
        try:
            data = line.recv(RECEIVE)
        except OSError:
            return
        if not data:
            return
        *lines, received = (received + data).split(b"\n")
        yield from lines
