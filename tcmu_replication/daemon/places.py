"""Where things are on this host: resource files, control sockets, and this host's own name.

Imports next to nothing: every command of an operator passes here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

CONFIG_DIRECTORY = "/etc/tcmu-replication"
RUN_DIRECTORY = "/run/tcmu-replication"
MANAGER = "_manager"
"""The name of the manager's socket; a resource cannot have it (its first letter)."""


def config_directory(option: str | None = None) -> Path:
    """Where resource files are: the option, or TCMU_REPLICATION_CONFIG, or /etc/tcmu-replication."""
    return Path(option or os.environ.get("TCMU_REPLICATION_CONFIG") or CONFIG_DIRECTORY)


def run_directory(option: str | None = None) -> Path:
    """Where control sockets are: the option, or TCMU_REPLICATION_RUN, or /run/tcmu-replication."""
    return Path(option or os.environ.get("TCMU_REPLICATION_RUN") or RUN_DIRECTORY)


def this_host(option: str | None = None) -> str:
    """The name of this host in resource files: the option, or TCMU_REPLICATION_HOST, or the node name."""
    return option or os.environ.get("TCMU_REPLICATION_HOST") or os.uname().nodename


def socket_path(run: Path, name: str) -> Path:
    """The control socket of a resource, of a device (uioN) or of the manager."""
    return run / f"{name}.sock"


class Context(NamedTuple):
    """Where a program of ours works: resource files, control sockets, and this host's name in the files."""

    config_directory: Path
    run_directory: Path
    host: str


def context(config: str | None = None, run: str | None = None, host: str | None = None) -> Context:
    """The context that the options, the environment and the defaults make."""
    return Context(config_directory(config), run_directory(run), this_host(host))
