"""Configures a lab host's kernel target through rtslib; tests/lab/target.py has the callers' side.

block NAME SERIAL DEVICE
fileio NAME SERIAL PATH SIZE
user NAME SERIAL CONFIG SIZE [KEY=VALUE,… for control]
export PLUGIN NAME TARGET ADDRESS
loop PLUGIN NAME WWN            prints the directory of the LUN's SCSI device in /sys
delete-backstore PLUGIN NAME
delete-target FABRIC TARGET
"""

import pathlib
import sys

import rtslib_fb as lio

PLUGINS = {
    "block": lio.BlockStorageObject,
    "fileio": lio.FileIOStorageObject,
    "user": lio.UserBackedStorageObject,
}
OPEN_TO_ALL = {
    "authentication": "0",
    "generate_node_acls": "1",
    "cache_dynamic_acls": "1",
    "demo_mode_write_protect": "0",
}
HW_MAX_SECTORS = 2048
"""Logical blocks in the largest request: 1 MiB, against the kernel's 64 KiB by default."""


def block(name: str, serial: str, device: str) -> None:
    lio.BlockStorageObject(name, dev=device, wwn=serial)


def fileio(name: str, serial: str, path: str, size: str) -> None:
    lio.FileIOStorageObject(name, dev=path, size=int(size), wwn=serial, write_back=True)


def user(name: str, serial: str, config: str, size: str, control: str = "") -> None:
    lio.UserBackedStorageObject(
        name,
        config=config,
        size=int(size),
        wwn=serial,
        hw_max_sectors=HW_MAX_SECTORS,
        control=control or None,
    )


def export(plugin: str, name: str, target: str, address: str) -> None:
    group = lio.TPG(lio.Target(lio.FabricModule("iscsi"), target), 1)
    for attribute, value in OPEN_TO_ALL.items():
        group.set_attribute(attribute, value)
    lio.LUN(group, 0, PLUGINS[plugin](name))
    lio.NetworkPortal(group, address, 3260)
    group.enable = True


def loop(plugin: str, name: str, wwn: str) -> None:
    group = lio.TPG(lio.Target(lio.FabricModule("loopback"), wwn), 1)
    lio.LUN(group, 0, PLUGINS[plugin](name))
    address = pathlib.Path(group.path, "address").read_text().strip()
    print(f"/sys/class/scsi_device/{address}:0/device")


def delete_backstore(plugin: str, name: str) -> None:
    PLUGINS[plugin](name).delete()


def delete_target(fabric: str, target: str) -> None:
    lio.Target(lio.FabricModule(fabric), target).delete()


if __name__ == "__main__":
    globals()[sys.argv[1].replace("-", "_")](*sys.argv[2:])
