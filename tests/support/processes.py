"""A pair of real worker processes on this machine's loopback, each with its own LUN over a unix NBD socket."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

from tcmu_replication.cli import exits
from tests.support.tools import PATIENCE_S

HOSTS = {"alpha": ("primary", "127.0.0.1"), "beta": ("secondary", "127.0.0.2")}
SECRET = b"what both ends know\n"
PORTS = iter(random.SystemRandom().sample(range(20000, 30000), 10000))
"""Below those that the kernel gives to clients, who could take one between `free_port` and its use."""


def free_port() -> int:
    """A TCP port that nobody has, on any address of this machine; another one at each call."""
    for port in PORTS:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
    raise AssertionError("every port has been given away")


class Worker:
    """`tcmu-replication serve disk0` as `host`, in its own directories below `base`.

    `certificates` is the directory for [tls], `secret` what this end's file of [link] has; `peer` what the
    other host's table has instead of a disk; `user`, if it is not this process's, whose the worker is.
    """

    def __init__(
        self,
        base: Path,
        host: str,
        resource: dict[str, object],
        link: dict[str, object],
        *,
        certificates: Path | None = None,
        secret: bytes | None = None,
        peer: dict[str, object] | None = None,
    ):
        self.host = host
        self.user: int | None = None
        self._certificates = certificates
        self._peer = peer
        self.base = base
        self.directory = base / host
        self.disk = self.directory / "disk.img"
        self.overlays = self.directory / "overlays"
        self.socket = self.directory / "lun.sock"
        self.module = "tcmu_replication"
        """What `start` runs; another module may prepare something and then do the same."""
        self.log = self.directory / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.overlays.mkdir(parents=True)
        (self.directory / "etc").mkdir()
        self.secret = self.directory / "etc/disk0.secret"
        if secret is not None:
            self.secret.touch(mode=0o600)
            self.secret.write_bytes(secret)
            link = {**link, "secret": str(self.secret)}
        with open(self.disk, "wb") as file:
            file.truncate(int(resource["size"]))
        (self.directory / "etc/disk0.toml").write_text(self._file(resource, link))

    def _file(self, resource: dict[str, object], link: dict[str, object]) -> str:
        lines = ["[resource]", *_lines(resource), "[link]", *_lines(link)]
        for name, (mode, address) in HOSTS.items():
            where = self.base / name
            lines += [f"[host.{name}]", *_lines({"mode": mode, "address": address})]
            storage = {"disk": str(where / "disk.img"), "overlays": str(where / "overlays")}
            lines += _lines(self._peer if self._peer and name != self.host else storage)
        if self._certificates is not None:
            lines += ["[tls]", *_lines({"certificates": str(self._certificates)})]
        lines += ["[nbd]", *_lines({"listen": f"unix:{self.socket}"})]
        return "\n".join(lines) + "\n"

    def set(self, key: str, value: object) -> None:
        """Give `key`, which is there once, another value in this host's file; true from the next start on."""
        path = self.directory / "etc/disk0.toml"
        lines = path.read_text().splitlines()
        (at,) = (number for number, line in enumerate(lines) if line.startswith(f"{key} = "))
        lines[at] = f"{key} = {json.dumps(value)}"
        path.write_text("\n".join(lines) + "\n")

    def exchange_roles(self) -> None:
        """In this host's file; true from the next start on."""
        path = self.directory / "etc/disk0.toml"
        other = {'mode = "primary"': 'mode = "secondary"', 'mode = "secondary"': 'mode = "primary"'}
        lines = [other.get(line, line) for line in path.read_text().splitlines()]
        path.write_text("\n".join(lines) + "\n")

    @property
    def _command(self) -> list[str]:
        return [
            sys.executable,
            "-m",
            self.module,
            f"--config={self.directory / 'etc'}",
            f"--run={self.directory / 'run'}",
            f"--host={self.host}",
        ]

    def start(self) -> None:
        """Start it and wait until it serves."""
        address = self.directory / "notify"
        address.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
            notices.bind(str(address))
            if self.user is not None:
                os.chown(address, self.user, -1)
            notices.settimeout(PATIENCE_S)
            with open(self.log, "ab") as log:
                self.process = subprocess.Popen(
                    [*_becoming(self.user), *self._command, "serve", "disk0"],
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "NOTIFY_SOCKET": str(address)},
                )
            while (said := notices.recv(4096)) == b"WATCHDOG=1":  # it lives, and does not serve yet
                pass
        assert b"READY=1" in said, f"{said!r}\n{self.log.read_text()}"

    def refuse_to_start(self) -> str:
        """Start it where it must not: what it says at its end."""
        refused = self.cli("serve", "disk0", check=False)
        assert refused.returncode == exits.WRONG, f"{refused.stdout}{refused.stderr}"
        return refused.stderr

    def kill(self) -> None:
        """SIGKILL: the process is gone, what it had given to the kernel is not."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def pause(self) -> None:
        """SIGSTOP: a frozen host."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """SIGTERM, and wait for the end."""
        if self.process is not None and self.process.poll() is None:
            self.resume()
            self.process.terminate()
            self.process.wait(PATIENCE_S)

    def cli(
        self, *words: str, check: bool = True, user: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A command of the operator on this host, or of another `user`."""
        done = subprocess.run(
            [*_becoming(user), *self._command, *words], capture_output=True, text=True, timeout=PATIENCE_S
        )
        if check:
            assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}\n{self.log.read_text()}"
        return done

    def status(self) -> dict:
        """`status disk0 --json`, protected or not."""
        done = self.cli("status", "disk0", "--json", check=False)
        assert done.returncode in exits.WORST_FIRST, f"{done.stdout}{done.stderr}\n{self.log.read_text()}"
        return json.loads(done.stdout)

    def io(self, *commands: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """qemu-io commands on this host's LUN."""
        words = [word for command in commands for word in ("-c", command)]
        done = subprocess.run(
            ["qemu-io", "-f", "raw", self.uri, *words], capture_output=True, text=True, timeout=PATIENCE_S
        )
        if check:
            assert done.returncode == 0, f"{commands}: {done.stdout}{done.stderr}"
            assert "Pattern verification failed" not in done.stdout, done.stdout
        return done

    def io_later(self, command: str) -> subprocess.Popen[bytes]:
        """A qemu-io command that goes on behind; nobody looks at how it ends."""
        return subprocess.Popen(
            ["qemu-io", "-f", "raw", self.uri, "-c", command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    @property
    def uri(self) -> str:
        """The LUN's NBD address."""
        return f"nbd+unix:///disk0?socket={self.socket}"


class Pair:
    """Both workers, running; use as a context. `certificates` has a directory for each host's [tls].

    Without them the link has a shared secret, unless `secrets`, by host, or `trust` of `link` says otherwise.
    `port` is where the secondary serves NBD, `control_port` where it takes peer commands. With `relayed` the
    primary looks for them elsewhere: `relayed` says for each such port where it has to lead (see `network`).
    A resync is `manual` unless it is said otherwise: most stories look at what is before it.
    """

    def __init__(
        self,
        base: Path,
        *,
        size: int,
        link: dict[str, object] | None = None,
        certificates: dict[str, Path] | None = None,
        secrets: dict[str, bytes] | None = None,
        relayed: bool = False,
        **resource: object,
    ):
        self.port = free_port()
        self.control_port = free_port()
        ports = {"port": self.port, "control-port": self.control_port}
        self.relayed = {free_port(): port for port in ports.values()} if relayed else {}
        resource.setdefault("resync", "manual")
        document = {"name": "disk0", "size": size, **{k.replace("_", "-"): v for k, v in resource.items()}}
        if secrets is None:
            secrets = {} if certificates or "trust" in (link or {}) else dict.fromkeys(HOSTS, SECRET)
        self.alpha, self.beta = (
            Worker(
                base,
                host,
                document,
                {**(self._ports_of(host) or ports), **(link or {})},
                certificates=(certificates or {}).get(host),
                secret=secrets.get(host),
            )
            for host in HOSTS
        )

    @property
    def equal(self) -> bool:
        """Whether both disks have the same bytes now."""
        return self.alpha.disk.read_bytes() == self.beta.disk.read_bytes()

    def _ports_of(self, host: str) -> dict[str, object]:
        return dict(zip(("port", "control-port"), self.relayed, strict=False)) if host == "alpha" else {}

    def __enter__(self) -> Pair:
        try:
            self.beta.start()
            self.alpha.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in (self.alpha, self.beta):
            worker.stop()

    def replicate(self) -> None:
        """`start` on both, the secondary first."""
        self.beta.cli("start", "disk0")
        self.alpha.cli("start", "disk0", "--wait")


def _becoming(user: int | None) -> list[str]:
    """What goes before a command that is to be another user's. The interpreter may lie where only root may look."""
    if user is None:
        return []
    look = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *look]


def _lines(values: dict[str, object]) -> list[str]:
    return [f"{key} = {json.dumps(value)}" for key, value in values.items()]
