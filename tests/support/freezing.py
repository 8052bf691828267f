"""A file system that can be frozen (fsfreeze(8)): what writes to it waits in the kernel, whatever it is sent."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from types import TracebackType

import pytest

from tcmu_replication.units import MiB

SIZE = 256 * MiB


class FreezingDisk:
    """An ext4 of its own below the `paths`, files or directories that are there; a context, thawed at its end."""

    def __init__(self, base: Path, *paths: Path) -> None:
        self._image, self._mount, self._paths = base / "freezing.img", base / "freezing", paths
        self._mounted: list[Path] = []
        self._frozen = False

    def __enter__(self) -> FreezingDisk:
        self._mount.mkdir()
        with open(self._image, "wb") as image:
            image.truncate(SIZE)
        _run("mkfs.ext4", "-q", self._image)
        try:
            self._attach("-o", "loop", self._image, self._mount)
            for number, path in enumerate(self._paths):
                _run("cp", "-a", "--sparse=always", path, inside := self._mount / str(number))
                self._attach("--bind", inside, path)
        except subprocess.CalledProcessError as error:
            self.__exit__(None, None, None)
            pytest.skip(f"no file system can be mounted here: {error.stderr}")
        return self

    def freeze(self) -> None:
        """From now on."""
        self._frozen = True
        _run("fsfreeze", "-f", self._mount)

    def thaw(self) -> None:
        """Everything goes on."""
        if self._frozen:
            _run("fsfreeze", "-u", self._mount)
            self._frozen = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.thaw()
        for path in reversed(self._mounted):
            _run("umount", path)

    def _attach(self, *words: object) -> None:
        _run("mount", *words)
        self._mounted.append(Path(str(words[-1])))


def _run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True)
