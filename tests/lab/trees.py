"""File trees as values: each file's path and SHA-256. What was written, and what is there."""

from __future__ import annotations

import hashlib
import os
import pathlib
import random
import sysconfig
from collections.abc import Iterable, Iterator

from tcmu_replication.units import MiB
from tests.lab.host import Host

Tree = dict[str, str]
"""Path below the tree's root to the hexadecimal SHA-256 of the file."""

FILES = 1200
BYTES = 32 * MiB
LARGEST = MiB
SHOWN = 10


def real_files(folder: pathlib.Path) -> Tree:
    """Copies a part of this machine's Python library into `folder`: at least `FILES` files and `BYTES` bytes."""
    tree: Tree = {}
    size = 0
    for name, source in _library():
        data = source.read_bytes()
        tree[name] = write(folder, name, data)
        size += len(data)
        if len(tree) >= FILES and size >= BYTES:
            return tree
    raise RuntimeError(f"this Python's library has {len(tree)} files, {size} bytes: too few to be copied")


def _library() -> Iterator[tuple[str, pathlib.Path]]:
    """The library's files, then those of installed packages, as name in the tree and path."""
    for which in ("stdlib", "purelib"):
        root = pathlib.Path(sysconfig.get_path(which))
        for directory, folders, names in os.walk(root):
            folders[:] = sorted(set(folders) - {"__pycache__", "site-packages", "dist-packages"})
            for name in sorted(names):
                path = pathlib.Path(directory, name)
                if path.is_file() and not path.is_symlink() and path.stat().st_size <= LARGEST:
                    yield f"{which}/{path.relative_to(root)}", path


def made_files(folder: pathlib.Path, names: Iterable[str], seed: int) -> Tree:
    """Makes files of 0 to 64 KiB of noise in `folder`."""
    noise = random.Random(seed)
    return {name: write(folder, name, noise.randbytes(noise.randrange(65536))) for name in names}


def write(folder: pathlib.Path, name: str, data: bytes) -> str:
    """Makes the file `name` in `folder`; its SHA-256."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def read(host: Host, folder: str) -> Tree:
    """The files below `folder` of a host, as its kernel reads them now."""
    listed = host.run(f"cd {folder} && find . -type f -print0 | sort -z | xargs -0 -r sha256sum --")
    return {name.removeprefix("./"): digest for digest, name in _lines(listed.stdout)}


def written(said: str) -> Tree:
    """What guest/writer.py said that it wrote."""
    return dict(line.split() for line in said.splitlines())


def _lines(listed: str) -> Iterator[tuple[str, str]]:
    for line in listed.splitlines():
        digest, _, name = line.partition("  ")
        yield digest, name


def differences(expected: Tree, found: Tree) -> str:
    """What is wrong with `found`, in words; empty if every byte is right."""
    wrong = {
        "missing": [name for name in expected if name not in found],
        "not expected": [name for name in found if name not in expected],
        "different": [name for name in expected if name in found and found[name] != expected[name]],
    }
    return "; ".join(
        f"{len(names)} {what}: {', '.join(names[:SHOWN])}{', …' * (len(names) > SHOWN)}"
        for what, names in wrong.items()
        if names
    )
