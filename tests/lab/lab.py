"""A lab: hosts and their network as one context that leaves nothing behind but logs."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from tests.lab import guard as guard_module
from tests.lab.disk import Disk
from tests.lab.host import KERNEL, MODULES, Host
from tests.lab.network import Network

TOOLS = (KERNEL, "mkfs.ext4", "insmod", "modprobe", "ip")
"""Programs without which no host boots."""


def missing_tools() -> list[str]:
    """Which of `TOOLS` this machine does not have."""
    return [tool for tool in TOOLS if shutil.which(tool) is None]


class Lab:
    """Hosts on a network. At its end every host is off and only `logs` remains.

    `logs` gets one folder per host: console.log, what its kernel said, and
    commands.log, what was run in it and what that said.
    """

    def __init__(self, logs: pathlib.Path):
        self.logs = logs
        self.hosts: dict[str, Host] = {}
        self.networks: list[Network] = []
        self._folder: pathlib.Path
        self.guard: subprocess.Popen[str]
        """The process that clears up should this one die."""

    def __enter__(self) -> Lab:
        real_disk = os.environ.get("TMPDIR", "/var/tmp")
        self._folder = pathlib.Path(tempfile.mkdtemp(prefix="tcmu-lab-", dir=real_disk))
        # In a session of its own: it must outlive a Ctrl-C that ends us.
        self.guard = subprocess.Popen(
            [sys.executable, "-S", "-E", guard_module.__file__, str(self._folder)],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self

    def __exit__(self, *exc: object) -> None:
        for host in self.hosts.values():
            host.kill()
        for network in self.networks:
            network.close()
        assert self.guard.stdin is not None
        self.guard.stdin.close()
        self.guard.wait()

    def _tell_guard(self, line: str) -> None:
        assert self.guard.stdin is not None
        self.guard.stdin.write(line + "\n")
        self.guard.stdin.flush()

    def host(
        self, name: str, disks: Sequence[Disk] = (), memory: str = "512M", modules: Sequence[str] = MODULES
    ) -> Host:
        """Describes a host; `boot` boots it."""
        host = Host(name, self._folder / name, self.logs / name, disks, memory, modules, self._tell_guard)
        self.hosts[name] = host
        return host

    def network(self, **addresses: str) -> Network:
        """Joins hosts, before they boot: network(alpha="10.77.0.1/24", …). They know each other by name."""
        network = Network(addresses)
        self.networks.append(network)
        plain = {name: address.partition("/")[0] for name, address in addresses.items()}
        for name, address in addresses.items():
            self.hosts[name].connect(network.port(name), address, plain)
        return network

    def boot(self) -> None:
        """Boots all hosts that are off, at the same time."""
        resting = [host for host in self.hosts.values() if not host.running]
        for host in resting:
            host.start()
        for host in resting:
            host.await_boot()

    def renew(self) -> None:
        """All hosts as on their first day, running, and the networks whole; costs nothing if they are."""
        for network in self.networks:
            network.heal()
        for host in self.hosts.values():
            if not host.fresh:
                host.kill()
                host.wipe()
        self.boot()
