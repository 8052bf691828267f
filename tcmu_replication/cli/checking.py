"""`tcmu-replication check`: every resource file that is asked for, against this host."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from tcmu_replication.cli import exits
from tcmu_replication.daemon import config
from tcmu_replication.daemon.host_check import check_certificates, check_host
from tcmu_replication.errors import Error


def run(files: Sequence[Path] | None, directory: Path, host: str) -> None:
    """Check `files`, or all of `directory`; one line each; exit status 2 if one is wrong."""
    paths = sorted(directory.glob("*.toml")) if files is None else files
    if not paths:
        click.echo(f"no resource files in {directory}")
    others, _ = config.load_all(directory)
    wrong = False
    for path in paths:
        try:
            resource = config.load(path)
            if resource.is_served_on(host) or files is not None:
                check_host(resource, host, others.values())
                check_certificates(resource, host)
                click.echo(f"{path}: good, {resource.host(host).mode} on {host}")
            else:
                click.echo(f"{path}: good, and {host} has no part in it")
        except Error as error:
            wrong = True
            click.echo(str(error), err=True)
    if wrong:
        sys.exit(exits.WRONG)
