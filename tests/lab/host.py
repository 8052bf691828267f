"""One host of the lab: a user-mode Linux kernel as a process, from its boot line to its end."""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import shlex
import shutil
import signal
import site
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from tcmu_replication.units import GiB
from tests.lab import disk as disks_module
from tests.lab import processor
from tests.lab.channel import PATIENCE_S, Channel, Command, HostDiedError, LabError
from tests.lab.disk import Disk

KERNEL = "linux.uml"
GUEST = pathlib.Path(__file__).parent / "guest"
REPOSITORY = pathlib.Path(__file__).parents[2]

MODULES = (
    "configfs",
    "target_core_user",
    "target_core_file",
    "target_core_iblock",
    "tcm_loop",
    "iscsi_target_mod",
    "iscsi_tcp",
    "sd_mod",
)
"""What every host loads at boot, unless told otherwise: both a target and an initiator."""

FRESH_FOLDERS = (
    "etc/iscsi",
    "etc/target",
    "etc/rtslib-fb-target",
    "var/target",
    "etc/tcmu-replication",
    "var/lib/tcmu-replication",
    "var/log/tcmu-replication",
)
"""Below the root; empty at a host's first boot, whatever this machine has there."""

FILE_SYSTEMS = (
    ("sysfs", "/sys", "sysfs", "defaults"),
    ("configfs", "/sys/kernel/config", "configfs", "defaults"),
    ("devpts", "/dev/pts", "devpts", "defaults"),
    ("tmpfs", "/dev/shm", "tmpfs", "defaults"),
    ("tmpfs", "/run", "tmpfs", "defaults"),
)
"""What every host mounts beside its disks, in this order: device, folder, type, options."""

SYSTEM = Disk("system", 1 * GiB, mount="/")
MTU = 9000
"""Jumbo frames, as storage networks have them; three times as fast as 1500."""


class Host:
    """A host: created by `Lab.host`, booted by `Lab.boot` or `boot`.

    `disks` appear as /dev/ubdb, /dev/ubdc, … in their order (`device` knows);
    /dev/ubda is the system disk, which keeps what the host wrote anywhere on
    its root across `kill` and `restart`, as far as its kernel had written it.
    /lab inside is `folder` outside, for files to pass.
    """

    def __init__(
        self,
        name: str,
        folder: pathlib.Path,
        logs: pathlib.Path,
        disks: Sequence[Disk] = (),
        memory: str = "512M",
        modules: Sequence[str] = MODULES,
        guard: Callable[[str], None] = lambda line: None,
    ):
        if len(disks) > 7:
            raise ValueError(f"host {name}: {len(disks)} disks; there is room for 7")
        self.name = name
        self.folder = folder
        self.disks = tuple(disks)
        self.memory = memory
        self.modules = tuple(modules)
        self.console = logs / "console.log"
        self.commands = logs / "commands.log"
        self.port: socket.socket | None = None
        """The guest's end of the network, if it has one."""
        self.address: str | None = None
        """With its prefix length: "10.77.0.1/24"."""
        self._peers: dict[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._guard = guard
        self._numbers = itertools.count(1)
        self._log_lock = threading.Lock()
        folder.mkdir()
        logs.mkdir(parents=True, exist_ok=True)
        for old in (self.console, self.commands):
            old.unlink(missing_ok=True)
        self.fresh = False
        """Whether its disks are new and no command has run."""
        self.wipe()

    def image(self, name: str) -> pathlib.Path:
        """The image file of the disk called `name`, outside the host."""
        return self.folder / f"{name}.img"

    def device(self, name: str) -> str:
        """The path inside the host of the disk called `name`: "/dev/ubdb"."""
        return "/dev/" + self._device(name)

    def _device(self, name: str) -> str:
        names = [SYSTEM.name, *(disk.name for disk in self.disks)]
        return "ubd" + "abcdefgh"[names.index(name)]

    def connect(self, port: socket.socket, address: str, peers: dict[str, str]) -> None:
        """Gives it a network card from the next boot on; `peers` are the names that it can resolve."""
        self.port, self.address, self._peers = port, address, peers

    # Life

    def start(self) -> None:
        """Starts its kernel and returns at once; `await_boot` follows."""
        if self.running:
            raise LabError(f"{self.name} is running already")
        self._write_settings()
        ours, theirs = socket.socketpair()
        handed_on = [theirs.fileno()]
        if self.port is not None:
            _empty(self.port)
            handed_on.append(self.port.fileno())
        with self.console.open("ab") as console, theirs:
            self._process = subprocess.Popen(
                [KERNEL, *self._boot_line(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                pass_fds=handed_on,
                start_new_session=True,
                env=os.environ | {"TMPDIR": memory_folder()} | processor.environment(),
            )
        self._guard(f"+{self._process.pid}")
        self._channel = Channel(self.name, ours, self._log)

    def await_boot(self, timeout: float = PATIENCE_S) -> None:
        """Returns when commands can run in it; raises HostDiedError with the end of its console otherwise."""
        assert self._channel is not None
        in_time = self._channel.ready.wait(timeout)
        if not in_time or self._channel.lost.is_set():
            self.kill()
            end = self.console.read_text(errors="replace")[-3000:]
            what = "ended while it booted" if in_time else f"did not boot within {timeout} s"
            raise HostDiedError(f"{self.name} {what}. Its console:\n{end}")

    def boot(self) -> None:
        """Starts its kernel and waits until commands can run."""
        self.start()
        self.await_boot()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The kernel's process."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """Power loss: SIGKILL to its kernel. The disks keep what the kernel had written to them."""
        if self._process is None:
            return
        # Its programs are processes of their own here, in a session that is theirs alone. All are killed in one call:
        # a program whose kernel has died before it makes its next system calls to the kernel of this machine.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._guard(f"-{self._process.pid}")
        self._process = None
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def wipe(self) -> None:
        """New disks; the host must be off."""
        for disk in (SYSTEM, *self.disks):
            self.image(disk.name).unlink(missing_ok=True)
            disks_module.create(disk, self.image(disk.name))
        self.fresh = True

    def restart(self) -> None:
        """Power loss if it runs, then boot with the same disks."""
        self.kill()
        self.boot()

    # Commands

    def run(
        self, command: str | Sequence[str], timeout: float = PATIENCE_S, *, check: bool = True
    ) -> Command:
        """Runs a shell line (or an argument list) to its end; raises as `Command.wait` does."""
        return self.spawn(command).wait(timeout, check=check)

    def spawn(self, command: str | Sequence[str]) -> Command:
        """Starts a shell line (or an argument list) and returns at once."""
        arguments = ["sh", "-c", command] if isinstance(command, str) else list(command)
        title = command if isinstance(command, str) else shlex.join(command)
        return self._started(title, {"run": arguments})

    def python(
        self, script: pathlib.Path, *arguments: str, preload: Sequence[str] = (), timeout: float = PATIENCE_S
    ) -> Command:
        """Runs a Python file in a fork of the agent, where `preload`ed modules are imported once for all.

        Nearly free, against half a second to start an interpreter in there.
        """
        request = {
            "python": script.read_text(),
            "name": str(script),
            "args": list(arguments),
            "preload": list(preload),
        }
        return self._started(shlex.join(["python", script.name, *arguments]), request).wait(timeout)

    def _started(self, title: str, request: dict) -> Command:
        if self._channel is None:
            raise HostDiedError(f"{self.name}: the host is not running")
        self.fresh = False
        return self._channel.start(title, request)

    def wait_until(self, condition: str, timeout: float = PATIENCE_S) -> None:
        """Returns when a shell condition holds inside; raises CommandError if it does not in time."""
        self.run(f"until {condition}; do sleep 0.05; done", timeout)

    # Files

    def put(self, source: pathlib.Path, target: str) -> None:
        """Copies a file or a folder from here to `target` inside."""
        with self._passing() as passing:
            if source.is_dir():
                shutil.copytree(source, passing, symlinks=True)
            else:
                shutil.copyfile(source, passing)
            self.run(["sh", "-c", 'mkdir -p "$(dirname "$1")" && cp -a "/lab/$0" "$1"', passing.name, target])

    def get(self, source: str, target: pathlib.Path) -> None:
        """Copies a file from inside to `target` here."""
        with self._passing() as passing:
            self.run(["cp", source, f"/lab/{passing.name}"])
            shutil.copyfile(passing, target)

    def write(self, target: str, text: str) -> None:
        """Makes the file `target` inside with `text`, on its disk when this returns."""
        with self._passing() as passing:
            passing.write_text(text)
            self.run(["sh", "-c", 'install -D -m 644 "/lab/$0" "$1" && sync "$1"', passing.name, target])

    def read(self, source: str) -> str:
        """The text of the file `source` inside."""
        return self.run(["cat", source]).stdout

    @contextlib.contextmanager
    def _passing(self) -> Iterator[pathlib.Path]:
        path = self.folder / f"passing-{next(self._numbers)}"
        try:
            yield path
        finally:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    # Boot

    def _boot_line(self, serial: int) -> list[str]:
        line = [
            f"mem={self.memory}",
            "root=/dev/root",
            "rootfstype=hostfs",
            "rootflags=/",
            "ro",
            f"init={GUEST / 'init'}",
            f"LAB_DIR={self.folder}",
            # A second of measuring which code is best at a RAID that nobody has.
            "initcall_blacklist=raid6_select_algo",
            "con=null",
            "con0=null,fd:1",
            f"ssl0=fd:{serial},fd:{serial}",
            "quiet",
        ]
        for disk in (SYSTEM, *self.disks):
            line.append(f"{self._device(disk.name)}={self.image(disk.name)}")
        if self.port is not None:
            line.append(f"vec0:transport=fd,fd={self.port.fileno()},mac={self._mac()},vec=0,mtu={MTU}")
        return line

    def _mac(self) -> str:
        """Its network card's address, the same at every boot: locally administered, from its IP address."""
        assert self.address is not None
        octets = self.address.partition("/")[0].split(".")
        return ":".join(["02", "00", *(f"{int(octet):02x}" for octet in octets)])

    def _write_settings(self) -> None:
        """The files that guest/init reads."""
        mounted = [disk for disk in self.disks if disk.mount is not None]
        settings = {
            "NAME": self.name,
            "SYSTEM_DISK": self._device(SYSTEM.name),
            "FRESH_FOLDERS": " ".join(FRESH_FOLDERS),
            "MOUNT_FOLDERS": " ".join(str(disk.mount).lstrip("/") for disk in mounted),
            "MODULES": " ".join(self.modules),
            "PYTHON": sys.executable,
            "AGENT": str(GUEST / "agent.py"),
        }
        tools = pathlib.Path(sys.executable).parent
        self._write(
            "settings",
            *(f"{name}={shlex.quote(value)}" for name, value in settings.items()),
            f"export PATH={shlex.quote(str(tools))}:$PATH",
            f"export LAB_PYTHONPATH={shlex.quote(':'.join([str(REPOSITORY), *site.getsitepackages()]))}",
        )
        peers = [f"{address} {name}" for name, address in self._peers.items()]
        self._write("hosts", "127.0.0.1 localhost", *peers)
        card = [f"addr add {self.address} dev vec0", "link set vec0 up"] if self.address else []
        self._write("ip", "link set lo up", *card)
        mounts = [
            *FILE_SYSTEMS,
            ("lab", "/lab", "hostfs", str(self.folder)),
            *((self.device(disk.name), str(disk.mount), "ext4", "noinit_itable") for disk in mounted),
        ]
        self._write("fstab", *(" ".join(fields) + " 0 0" for fields in mounts))

    def _write(self, name: str, *lines: str) -> None:
        (self.folder / name).write_text("\n".join(lines) + "\n")

    def _log(self, text: str) -> None:
        with self._log_lock, self.commands.open("a") as log:
            log.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def memory_folder() -> str:
    """Where kernels keep their memory: a file each, mapped executable, as large as what they touched."""
    shared = "/dev/shm"
    with contextlib.suppress(OSError):
        status = os.statvfs(shared)
        if not status.f_flag & os.ST_NOEXEC and status.f_bavail * status.f_frsize > 4 * GiB:
            return shared
    return "/var/tmp"


def _empty(port: socket.socket) -> None:
    """A card that was off has received nothing."""
    with contextlib.suppress(BlockingIOError):
        while port.recv(1 << 16, socket.MSG_DONTWAIT):
            pass
