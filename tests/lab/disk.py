"""Disks of lab hosts: sparse image files that a host sees as block devices."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess


@dataclasses.dataclass(frozen=True)
class Disk:
    """One disk of a host, `size` bytes of zeros when new.

    With `mount`, it bears an ext4 that every boot mounts there.
    """

    name: str
    size: int
    mount: str | None = None


def create(disk: Disk, image: pathlib.Path) -> None:
    """Makes `disk`'s image file; its holes take no space."""
    with open(image, "xb") as f:
        os.truncate(f.fileno(), disk.size)
    if disk.mount is not None:
        subprocess.run(
            ["mkfs.ext4", "-q", "-F", "-m", "0", "-L", disk.name[:16], "-E", "nodiscard", os.fspath(image)],
            check=True,
            capture_output=True,
        )
