"""The kernel's target on a lab host in plain words: backstores, iSCSI exports, local LUNs.

Each is made by its constructor and gone after `delete`, or at the end of a
`with` if its host still lives.
"""

from __future__ import annotations

import pathlib
from typing import Self

from tests.lab.channel import Command
from tests.lab.host import Host

SCRIPT = pathlib.Path(__file__).parent / "guest" / "target.py"


class _Configured:
    """Something in the kernel's configuration of `host`."""

    def __init__(self, host: Host):
        self.host = host

    def delete(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.host.running:
            self.delete()


class Backstore(_Configured):
    """A backstore; made by `block`, `fileio` or `user`. `serial` is the unit's serial number, a UUID."""

    def __init__(self, host: Host, plugin: str, name: str, serial: str, *arguments: str):
        super().__init__(host)
        self.plugin = plugin
        self.name = name
        self.serial = serial
        _configure(host, plugin, name, serial, *arguments)

    def delete(self) -> None:
        _configure(self.host, "delete-backstore", self.plugin, self.name)


def block(host: Host, name: str, serial: str, device: str) -> Backstore:
    """A backstore on a block device of the host."""
    return Backstore(host, "block", name, serial, device)


def fileio(host: Host, name: str, serial: str, path: str, size: int) -> Backstore:
    """A backstore on a file of the host, made if it is not there; `size` in bytes."""
    return Backstore(host, "fileio", name, serial, path, str(size))


def user(host: Host, name: str, serial: str, config: str, size: int, control: str = "") -> Backstore:
    """A backstore of a handler in user space, as "replication/disk0"; `size` in bytes.

    `control` is passed to the kernel: "max_data_area_mb=16".
    """
    return Backstore(host, "user", name, serial, config, str(size), control)


class Export(_Configured):
    """`backstore` as LUN 0 of an iSCSI target that anyone may use, at `address`."""

    def __init__(self, backstore: Backstore, name: str, address: str):
        super().__init__(backstore.host)
        self.name = name
        self.address = address
        _configure(self.host, "export", backstore.plugin, backstore.name, name, address)

    def delete(self) -> None:
        _configure(self.host, "delete-target", "iscsi", self.name)


class Loop(_Configured):
    """`backstore` as a disk of its own host, through tcm_loop; `device` is its path."""

    def __init__(self, backstore: Backstore):
        super().__init__(backstore.host)
        self.wwn = "naa.5001405" + backstore.serial.replace("-", "")[:9]
        made = _configure(self.host, "loop", backstore.plugin, backstore.name, self.wwn)
        self.device = block_device(self.host, made.stdout.strip())

    def delete(self) -> None:
        _configure(self.host, "delete-target", "loopback", self.wwn)


def block_device(host: Host, directories: str) -> str:
    """The path of the block device below SCSI device directories in /sys (a pattern), when it appears."""
    host.wait_until(f"[ -e {directories}/block/sd* ]")
    name = host.run(f"basename {directories}/block/sd*").stdout.strip()
    host.wait_until(f"[ -b /dev/{name} ]")
    return f"/dev/{name}"


def _configure(host: Host, *arguments: str) -> Command:
    return host.python(SCRIPT, *arguments, preload=["rtslib_fb"])
