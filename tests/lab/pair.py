"""A replicated disk on two lab hosts: its resource file, its daemons and its commands."""

from __future__ import annotations

import json
from typing import Any

from tcmu_replication.cli import exits
from tcmu_replication.units import MiB, format_size
from tests.lab import target
from tests.lab.channel import Command
from tests.lab.disk import Disk
from tests.lab.host import Host
from tests.lab.lab import Lab

NAME = "disk0"
SIZE = 256 * MiB
SERIAL = "d15c0000-7463-4d75-8000-000000000001"
STATE = "/var/lib/tcmu-replication"
DISKS = (Disk("data", SIZE), Disk("overlays", 768 * MiB, mount=STATE))
"""What each of the two hosts needs."""
ADDRESSES = {"alpha": "10.77.0.1/24", "beta": "10.77.0.2/24", "client": "10.77.0.3/24"}
PROGRAM = "tcmu-replication"


def describe(lab: Lab) -> None:
    """Adds to a lab what a pair needs: alpha, beta, an initiator called client, and their network."""
    for name in ("alpha", "beta"):
        lab.host(name, disks=DISKS)
    lab.host("client")
    lab.network(**ADDRESSES)


class Pair:
    """`NAME` on alpha (primary) and beta (secondary), which run."""

    def __init__(self, lab: Lab):
        self.primary = lab.hosts["alpha"]
        self.secondary = lab.hosts["beta"]
        self.daemons: dict[str, Command] = {}
        self.backstores: dict[str, target.Backstore] = {}

    def resource_file(self, **extra: str) -> str:
        """The file, the same on both hosts; `extra` are more lines of [resource], values in TOML."""
        lines = [
            "[resource]",
            f'name = "{NAME}"',
            f'size = "{format_size(SIZE)}"',
            f'serial = "{SERIAL}"',
            'resync = "manual"',  # most stories look at what is before it; `heal` is for the others
            *(f"{key.replace('_', '-')} = {value}" for key, value in extra.items()),
            "",
            "[link]",
            "port = 10809",
            "control-port = 10810",
            "reconnect-delay = 14",  # as long as may be: a slow machine needs it to start a worker again
            "timeout = 10",
            f'secret = "/etc/tcmu-replication/{NAME}.secret"',
        ]
        for host, mode in ((self.primary, "primary"), (self.secondary, "secondary")):
            lines += [
                "",
                f"[host.{host.name}]",
                f'mode = "{mode}"',
                f'address = "{ADDRESSES[host.name].partition("/")[0]}"',
                f'disk = "{host.device("data")}"',
                f'overlays = "{STATE}/{NAME}"',
            ]
        return "\n".join(lines) + "\n"

    def configure(self, **extra: str) -> None:
        """Gives both hosts the resource file and the overlays' directory."""
        for host in (self.primary, self.secondary):
            host.write(f"/etc/tcmu-replication/{NAME}.toml", self.resource_file(**extra))
            host.write(f"/etc/tcmu-replication/{NAME}.secret", "what alpha and beta know\n")
            host.run(f"chmod 600 /etc/tcmu-replication/{NAME}.secret")
            host.run(f"mkdir -p -m 700 {STATE}/{NAME} && sync")

    def start_daemons(self) -> None:
        """Starts the daemon on both hosts; returns when the resource's workers answer."""
        for host in (self.primary, self.secondary):
            self._spawn_daemon(host)
        for host in (self.primary, self.secondary):
            self._await_worker(host)

    def start_daemon(self, host: Host) -> None:
        """Starts the daemon on one host; returns when the resource's worker answers."""
        self._spawn_daemon(host)
        self._await_worker(host)

    def _spawn_daemon(self, host: Host) -> None:
        self.daemons[host.name] = host.spawn(f"exec {PROGRAM} daemon")

    def _await_worker(self, host: Host) -> None:
        # The manager's word when a worker is ready; a daemon that ends without it is told with what it said.
        self.daemons[host.name].wait_for(f"{NAME}: serves")

    def create_backstores(self) -> None:
        """Creates the LIO backstore on both hosts."""
        for host in (self.primary, self.secondary):
            self.backstores[host.name] = self.backstore(host)

    def backstore(self, host: Host) -> target.Backstore:
        """Creates the LIO backstore on one host."""
        return target.user(host, NAME, SERIAL, f"replication/{NAME}", SIZE)

    def begin(self) -> None:
        """All of it on hosts that run and are new, until it replicates."""
        self.configure()
        self.start_daemons()
        self.create_backstores()
        self.start()

    def start(self) -> None:
        """Begins to replicate, with two disks that are both empty."""
        self.command(self.secondary, "start")
        self.command(self.primary, "start", "--assume-clean")

    def command(self, host: Host, verb: str, *options: str) -> Any:
        """Gives a host a management command about the resource; its result."""
        done = host.run([PROGRAM, verb, NAME, "--json", *options], check=verb != "status")
        if verb == "status":
            assert done.returncode in exits.WORST_FIRST, done.stderr
        answer = json.loads(done.stdout)
        return answer[0]["result"] if verb != "status" else answer

    def heal(self) -> None:
        """Sends the secondary what it misses; returns when the pair is protected."""
        self.command(self.primary, "resync")
        self.primary.wait_until(f"{PROGRAM} status {NAME}")

    def is_whole(self) -> bool:
        """Whether it replicates: both hosts run, the link is up, no error is recorded."""
        if not (self.primary.running and self.secondary.running):
            return False
        state = self.status(self.primary)
        return state["link"]["state"] == "connected" and state["stage"] == "running" and not state["error"]

    def status(self, host: Host) -> dict[str, Any]:
        """The status document of the resource on a host."""
        return self.command(host, "status")
