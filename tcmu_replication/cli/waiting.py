"""Wait for the commit behind a failover, with a progress bar."""

from __future__ import annotations

import time
from io import StringIO
from pathlib import Path
from typing import Any

import click

from tcmu_replication.cli.ask import STATUS_S, ask
from tcmu_replication.errors import Error, Kind

PERIOD_S = 0.25


def for_jobs(run_directory: Path, name: str, *, quiet: bool) -> None:
    """Return when the resource has left the stage failover. Raises IO if the commit failed."""
    status = _status(run_directory, name)
    job = next(iter(status["jobs"]), None)
    if status["stage"] == "failover" and job is not None:
        # Quiet, the bar is drawn nowhere; click draws nothing but the label if this is no terminal.
        nowhere = StringIO() if quiet else None
        with click.progressbar(length=job["length"], label=f"{name}: {job['type']}", file=nowhere) as bar:
            while status["stage"] == "failover":
                for job in status["jobs"]:
                    bar.update(job["offset"] - bar.pos)
                time.sleep(PERIOD_S)
                status = _status(run_directory, name)
            bar.update((bar.length or 0) - bar.pos)
    if status["stage"] == "failover-failed":
        raise Error(Kind.IO, f"{name}: the commit failed: {status['error']}. Writes go on being kept apart")
    if not quiet:
        click.echo(f"{name}: stage {status['stage']}")


def for_comparison(run_directory: Path, name: str, *, quiet: bool) -> None:
    """Return when both disks have been compared. Raises MISCOMPARE if they are not known to be equal then."""
    status = _status(run_directory, name)
    if status["mode"] != "primary":
        return
    comparing = status.get("comparing")
    if comparing is not None:
        nowhere = StringIO() if quiet else None
        with click.progressbar(length=comparing["total"], label=f"{name}: compare", file=nowhere) as bar:
            while comparing is not None and status["stage"] == "running" and not status["error"]:
                bar.update(comparing["done"] - bar.pos)
                time.sleep(PERIOD_S)
                status = _status(run_directory, name)
                comparing = status.get("comparing")
            bar.update((bar.length or 0) - bar.pos)
    if status["error"]:
        raise Error(Kind.MISCOMPARE, f"{name}: {status['error']}")
    if not quiet:
        click.echo(f"{name}: both disks are equal")


def _status(run_directory: Path, name: str) -> dict[str, Any]:
    result: dict[str, Any] = ask(run_directory, name, "query-status", timeout=STATUS_S)
    return result
