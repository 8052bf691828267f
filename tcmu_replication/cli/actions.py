"""Give a command to resources and say what became of it, one line each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from tcmu_replication.cli import exits
from tcmu_replication.cli.ask import Answer, all_at_once, ask
from tcmu_replication.control.framing import kind_name

Arguments = Callable[[str], dict[str, Any]]


def run(
    run_directory: Path,
    names: Sequence[str],
    command: str,
    arguments: Arguments,
    line: Callable[[dict[str, Any]], str],
    *,
    as_json: bool,
) -> dict[str, dict[str, Any]]:
    """Ask all of `names` at once and print `line(result)` or the error of each; the results by name.

    If one failed the program ends with the exit status of the first failure,
    after all have been told.
    """
    answers = all_at_once(names, lambda name: ask(run_directory, name, command, arguments(name)))
    if as_json:
        _print_json(answers)
    else:
        for answer in answers:
            if answer.error is None:
                click.echo(f"{answer.resource}: {line(answer.result)}")
            else:
                click.echo(str(answer.error), err=True)
    failures = [answer.error for answer in answers if answer.error is not None]
    if failures:
        sys.exit(exits.STATUS_OF_KIND[failures[0].kind])
    return {answer.resource: answer.result for answer in answers}


def _print_json(answers: Sequence[Answer]) -> None:
    import json

    documents = []
    for answer in answers:
        document: dict[str, Any] = {"resource": answer.resource}
        if answer.error is None:
            document["result"] = answer.result
        else:
            document["error"] = {"kind": kind_name(answer.error.kind), "desc": str(answer.error)}
        documents.append(document)
    click.echo(json.dumps(documents, indent=2))
