"""`tcmu-replication check`: every resource file that is asked for, against this host."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import click

from tcmu_replication.cli import exits, output
from tcmu_replication.daemon import config
from tcmu_replication.daemon.config import Resource
from tcmu_replication.daemon.guards import link_guard, nbd_guard
from tcmu_replication.daemon.host_check import check_certificates, check_host
from tcmu_replication.daemon.listeners import check_listeners
from tcmu_replication.daemon.places import Context
from tcmu_replication.errors import Error

GOOD, WRONG, ELSEWHERE = "good", "wrong", "elsewhere"

Report = dict[str, Any]
"""What is said of a file: its `verdict`, this host's `mode`, what guards `link` and `nbd`, `errors`, `warnings`."""


def run(files: Sequence[Path] | None, context: Context, *, as_json: bool) -> None:
    """Check `files`, or all of the directory; exit status 2 if one is wrong, or if none is this host's."""
    directory, host = context.config_directory, context.host
    paths = sorted(directory.glob("*.toml")) if files is None else files
    others, _ = config.load_all(directory)
    reports = [_report(path, context, others.values()) for path in paths]
    if reports and all(report["verdict"] == ELSEWHERE for report in reports):
        for report in reports:
            _refuse_host(report, host)
    if as_json:
        _print_json(reports)
    else:
        _print(reports, directory)
    if any(report["verdict"] == WRONG for report in reports):
        sys.exit(exits.WRONG)


def _report(path: Path, context: Context, others: Collection[Resource]) -> Report:
    report: Report = {"file": str(path), "verdict": GOOD, "host": context.host}
    report |= {"mode": None, "link": None, "nbd": None, "hosts": [], "errors": [], "warnings": []}
    try:
        resource = config.load(path)
    except Error as error:
        return report | {"verdict": WRONG, "errors": [str(error)]}
    report["hosts"] = [name for name in sorted(resource.hosts) if resource.is_served_on(name)]
    if not resource.is_served_on(context.host):
        return report | {"verdict": ELSEWHERE}
    report |= {"mode": resource.host(context.host).mode, "link": link_guard(resource)}
    report["nbd"] = nbd_guard(resource)
    checks: list[Callable[[], list[str]]] = [
        lambda: check_host(resource, context.host, others),
        lambda: check_certificates(resource, context.host),
        lambda: check_listeners(resource, context.host, context.run_directory),
    ]
    for check in checks:
        try:
            report["warnings"] += check()
        except Error as error:
            report["verdict"] = WRONG
            report["errors"].append(str(error))
    return report


def _refuse_host(report: Report, host: str) -> None:
    """None of the files that were asked for is this host's: most likely its name is another one there."""
    report["verdict"] = WRONG
    names = " or ".join(report["hosts"])
    report["errors"].append(
        f"{report['file']}: host: found this host's name {host}; expected {names}: call this host so in the "
        "file, or say which of them it is with --host NAME"
    )


def _print(reports: Sequence[Report], directory: Path) -> None:
    if not reports:
        click.echo(f"no resource files in {directory}")
    for report in reports:
        file, host = report["file"], report["host"]
        for error in report["errors"]:
            click.echo(output.folded(error, "", sys.stderr), err=True)
        if report["verdict"] == ELSEWHERE:
            click.echo(output.folded(f"{file}: good, and {host} has no part in it", ""))
        if report["verdict"] == GOOD:
            click.echo(output.folded(f"{file}: good, {report['mode']} on {host}", ""))
            for port in ("link", "nbd"):
                if report[port] is not None:
                    click.echo(output.folded(f"{port}: {report[port]}", "  "))
        for warning in report["warnings"]:
            click.echo(output.folded(f"warning: {warning}", "  "))


def _print_json(reports: Sequence[Report]) -> None:
    import json

    click.echo(json.dumps(reports, indent=2))
