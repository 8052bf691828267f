"""systemd on a lab host: the first process of namespaces of its own, with the host's files, devices and network.

So contrib's units run as they do on a real host: their sandboxes, users, watchdogs and restarts.
"""

from __future__ import annotations

import pathlib
import sys

from tests.lab.channel import Command
from tests.lab.host import Host

CONTRIB = pathlib.Path(__file__).parents[2] / "contrib"
INSIDE = "nsenter -t $(pgrep -ox systemd) --mount --pid --root --wd -- "
"""Goes before a command."""
PREPARE = f"""
mkdir -p /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup
rm -rf /etc/systemd/system/* /etc/sysusers.d /etc/udev/rules.d
mkdir -p /etc/udev/rules.d /usr/local/sbin
cp -r {CONTRIB}/systemd/. /etc/systemd/system/
cp -r {CONTRIB}/sysusers.d /etc/
ln -sf "$(command -v tcmu-replication)" /usr/local/sbin/
ln -s /dev/null /etc/systemd/system/systemd-udev-trigger.service
mkdir -p /etc/tmpfiles.d && ln -sf /dev/null /etc/tmpfiles.d/tmp.conf
"""
"""Nothing is to be seen of the machine's own services; devices that are there, and /tmp, are left as they are."""

START = """
exec nsenter --target 1 --mount unshare --mount --pid --fork --kill-child sh -ec '
    cd /mnt/root
    pivot_root . mnt
    umount -l /mnt
    mount -t proc proc /proc
    exec env container=lab /lib/systemd/systemd --system --unit=basic.target'
"""
"""The root becomes that of a namespace: in a chroot, as the host's commands are, the kernel makes no user namespace."""


class Systemd:
    """systemd on `host`, with contrib's units, and `drop_ins` for them: the lines of [Service] by unit.

    The constructor starts it and returns at once; `await_boot` follows.
    """

    def __init__(self, host: Host, drop_ins: dict[str, str]):
        self.host = host
        host.run(PREPARE)
        for unit, lines in drop_ins.items():
            host.write(f"/etc/systemd/system/{unit}.d/lab.conf", f"[Service]\n{lines}\n")
        self._open_the_way_to_the_interpreter()
        host.run("systemd-sysusers /etc/sysusers.d/*.conf")
        host.spawn(["sh", "-c", START])

    def await_boot(self) -> None:
        """Returns when units can be started."""
        self.host.wait_until(f"{INSIDE} systemctl --quiet is-active basic.target 2>/dev/null")

    def _open_the_way_to_the_interpreter(self) -> None:
        """That of the tests may lie in somebody's home, where the units' users may not look."""
        self.host.run(["chmod", "o+x", *map(str, pathlib.Path(sys.executable).resolve().parents)])

    def run(self, command: str, *, check: bool = True) -> Command:
        """Runs a simple command where systemd is; raises as `Host.run` does."""
        return self.host.run(INSIDE + command, check=check)

    def start(self, unit: str) -> None:
        """Starts a unit and returns when it serves."""
        self.run(f"systemctl start {unit} || {{ {INSIDE} journalctl --no-pager -u {unit}; false; }}")

    def shows(self, unit: str, name: str) -> str:
        """A property of a unit (`systemctl show`)."""
        return self.run(f"systemctl show --value -p {name} {unit}").stdout.strip()

    def log(self, unit: str) -> str:
        """What the journal has of a unit."""
        return self.run(f"journalctl --no-pager -u {unit}").stdout
