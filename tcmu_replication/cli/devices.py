"""`tcmu-replication devices`: every LUN that the kernel has for a handler in user space, and who serves it.

The daemon knows (query-devices); `status` shows of it the LUNs that nobody serves.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from tcmu_replication.cli import exits, output
from tcmu_replication.cli.ask import STATUS_S
from tcmu_replication.control.client import Client
from tcmu_replication.daemon.places import MANAGER, socket_path
from tcmu_replication.errors import Error, Kind

Document = dict[str, Any]


def run(run_directory: Path, *, as_json: bool) -> None:
    """Show them; exit status 4 if the daemon does not answer, or if nobody serves a LUN of ours."""
    try:
        luns = ask(run_directory)
    except Error as error:
        hint = ". Is the daemon running? See `systemctl status tcmu-replication`"
        raise Error(error.kind, f"{error}{hint if error.kind is Kind.NOT_FOUND else ''}") from error
    if as_json:
        import json

        click.echo(json.dumps(luns, indent=2))
    else:
        click.echo(output.luns(luns) if luns else "no LUN in the kernel is for a handler in user space")
    if any(is_unserved(lun) for lun in luns):
        sys.exit(exits.ABSENT)


def ask(run_directory: Path) -> list[Document]:
    """What the daemon knows of each LUN (schema.DeviceInfo). Raises `Error`: NOT_FOUND if there is no daemon."""
    with Client.unix(socket_path(run_directory, MANAGER)) as client:
        luns: list[Document] = client.execute("query-devices", timeout=STATUS_S)
        return luns


def unserved(run_directory: Path, name: str | None = None) -> list[Document]:
    """The LUNs that nobody serves, and should; with `name` only those of this resource or device.

    Without a daemon none: its workers are asked one by one, and those that are down say so.
    """
    try:
        luns = ask(run_directory)
    except Error as error:
        if error.kind is Kind.PERMISSION:
            raise
        if error.kind is not Kind.NOT_FOUND:
            click.echo(f"warning: the daemon does not say which LUNs nobody serves: {error}", err=True)
        return []
    return [lun for lun in luns if is_unserved(lun) and (name is None or name in _names(lun))]


def is_unserved(lun: Document) -> bool:
    """Whether it is one of ours that nobody serves, and not only just coming."""
    return bool(lun["state"] == "unserved")


def _names(lun: Document) -> set[str]:
    return {lun["device"], lun["config"].removeprefix("replication/")}
