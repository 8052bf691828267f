"""Runs commands inside a lab host; its process 1, at the other end of tests/lab/channel.py.

Speaks JSON lines over a serial line. Every request bears an `id`, and so does
every line about it:

    {"id": 1, "run": ["sh", "-c", "…"]}          start a program
    {"id": 1, "python": "source", "preload": []}  run Python in a fork of this process
    {"id": 1, "signal": 9}                        to the whole process group of 1
    -> {"id": 1, "out": "…"}  {"id": 1, "err": "…"}   as it comes
    -> {"id": 1, "exit": 0}                           last; minus the signal, if one ended it

A system call costs a hundred microseconds in here and starting Python with a
library half a second, hence the forks: modules named in `preload` are imported
once, in this process. One thread, which is what makes forking right.
Standard library only; never imports the project.
"""

import contextlib
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import traceback
import tty

LINE = "/dev/ttyS0"
CHUNK = 1 << 16


class Agent:
    def __init__(self) -> None:
        self.line = os.open(LINE, os.O_RDWR | os.O_NOCTTY)
        tty.setraw(self.line)
        self.selector = selectors.DefaultSelector()
        self.received = b""
        self.ids: dict[int, int] = {}  # of running processes: pid to request id
        self.pipes: dict[int, dict[int, str]] = {}  # request id to its open pipes and their names

    def serve(self) -> None:
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_read, False)
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.selector.register(self.line, selectors.EVENT_READ, self.read_line)
        self.selector.register(wake_read, selectors.EVENT_READ, self.reap)
        self.send({"ready": True})
        while True:
            for key, _ in self.selector.select():
                # What was done for one event may have closed another's pipe, or opened one of its number.
                if self.selector.get_map().get(key.fd) is key:
                    key.data(key.fd)

    def send(self, message: dict) -> None:
        view = memoryview(json.dumps(message).encode() + b"\n")
        while view:
            view = view[os.write(self.line, view) :]

    def read_line(self, _fd: int) -> None:
        self.received += os.read(self.line, CHUNK)
        *lines, self.received = self.received.split(b"\n")
        for line in lines:
            self.obey(json.loads(line))

    def obey(self, message: dict) -> None:
        number = message["id"]
        if "signal" in message:
            for pid in [pid for pid, owner in self.ids.items() if owner == number]:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, message["signal"])
            return
        try:
            for module in message.get("preload", []):
                importlib.import_module(module)
        except Exception:
            self.send({"id": number, "err": traceback.format_exc()})
            self.send({"id": number, "exit": 1})
            return
        self.start(number, message)

    def start(self, number: int, message: dict) -> None:
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        try:
            pid = (run_program if "run" in message else run_python)(message, out_write, err_write)
        except OSError as e:
            self.send({"id": number, "err": f"{message['run'][0]}: {e.strerror}"})
            self.send({"id": number, "exit": 127})
            for fd in (out_read, err_read):
                os.close(fd)
            return
        finally:
            os.close(out_write)
            os.close(err_write)
        self.ids[pid] = number
        self.pipes[number] = {out_read: "out", err_read: "err"}
        for fd in self.pipes[number]:
            os.set_blocking(fd, False)
            self.selector.register(fd, selectors.EVENT_READ, lambda fd: self.forward(number, fd))

    def forward(self, number: int, fd: int) -> None:
        """Passes on what a command wrote; at the pipe's end closes it."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(fd, CHUNK):
                self.send({"id": number, self.pipes[number][fd]: data.decode("utf-8", "surrogateescape")})
            self.close(number, fd)

    def close(self, number: int, fd: int) -> None:
        self.selector.unregister(fd)
        os.close(fd)
        del self.pipes[number][fd]

    def reap(self, fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(fd, CHUNK)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = ended
                number = self.ids.pop(pid, None)
                if number is not None:  # None: an orphan that became ours
                    self.end(number, os.waitstatus_to_exitcode(status))

    def end(self, number: int, status: int) -> None:
        """All that a command wrote is sent, then its status; a daemon it left may hold the pipes for ever."""
        for fd in list(self.pipes[number]):
            self.forward(number, fd)
        for fd in list(self.pipes[number]):
            self.close(number, fd)
        del self.pipes[number]
        self.send({"id": number, "exit": status})


def run_program(message: dict, out: int, err: int) -> int:
    """Starts a program in a session of its own; its pid."""
    # Popen borrows this process's memory until the exec (vfork): a fork would cost a tenth of a second.
    program = subprocess.Popen(
        message["run"], stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
    )
    program.returncode = 0  # reap() waits for it, not Popen
    return program.pid


def run_python(message: dict, out: int, err: int) -> int:
    """Runs Python source in a fork, in a session of its own; its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.closerange(3, 1024)
        sys.argv = [message["name"], *message["args"]]
        exec(compile(message["python"], message["name"], "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.path[:0] = os.environ["LAB_PYTHONPATH"].split(":")
    Agent().serve()
