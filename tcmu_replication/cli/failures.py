"""`tcmu-replication errors`: what is recorded, and who is not protected though nothing is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from tcmu_replication.cli import exits, output
from tcmu_replication.cli.ask import STATUS_S, all_at_once, ask
from tcmu_replication.control.framing import kind_name


def run(run_directory: Path, names: Sequence[str], *, as_json: bool) -> None:
    """Show them; the exit status is that of the first who failed to answer, else 1, 8 or 0 (see `exits`)."""

    def both(name: str) -> dict[str, Any]:
        found: dict[str, Any] = ask(run_directory, name, "query-errors", timeout=STATUS_S)
        status = ask(run_directory, name, "query-status", timeout=STATUS_S)
        return {**found, "since": status.get("error-since"), "protection": status["protection"]}

    answers = all_at_once(names, both)
    if as_json:
        _print_json(answers)
    else:
        for answer in answers:
            if answer.error is None:
                click.echo(_text(answer.resource, answer.result))
            else:
                click.echo(str(answer.error), err=True)
    if failed := [answer.error for answer in answers if answer.error is not None]:
        sys.exit(exits.STATUS_OF_KIND[failed[0].kind])
    if any(answer.result["error"] for answer in answers):
        sys.exit(exits.FAILED)
    if not all(answer.result["protection"]["protected"] for answer in answers):
        sys.exit(exits.UNPROTECTED)


def _text(name: str, result: dict[str, Any]) -> str:
    protection = result["protection"]
    since = f", since {result['since']}" if result["since"] else ""
    error = f"{result['desc']}{since}" if result["error"] else "no error"
    lines = [output.folded(f"{name}: {error}", "")]
    if not protection["protected"]:
        lines.append(output.verdict(name, protection))
    return "\n".join(lines)


def _print_json(answers: Sequence[Any]) -> None:
    import json

    documents = [
        {"resource": answer.resource, "result": answer.result}
        if answer.error is None
        else {
            "resource": answer.resource,
            "error": {"kind": kind_name(answer.error.kind), "desc": str(answer.error)},
        }
        for answer in answers
    ]
    click.echo(json.dumps(documents, indent=2))
