"""`tcmu-replication status`: once, or again and again."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from tcmu_replication.cli import exits, output
from tcmu_replication.cli.ask import STATUS_S, all_at_once, ask

PERIOD_S = 0.5
Document = dict[str, Any]


def run(run_directory: Path, names: Sequence[str], *, detailed: bool, as_json: bool, watch: bool) -> None:
    """Show the status of `names`; exit status 4 if one of them is down."""
    if watch:
        _watch(run_directory, names, detailed=detailed, as_json=as_json)
        return
    documents = fetch(run_directory, names)
    click.echo(_json(documents, detailed) if as_json else _text(documents, detailed), nl=True)
    if any(document.get("stage") == "down" for document in documents):
        sys.exit(exits.ABSENT)


def devices(run_directory: Path) -> list[str]:
    """The LUNs that are no resources: workers of UIO devices have sockets of their own."""
    return sorted(path.stem for path in run_directory.glob("uio*.sock"))


def fetch(run_directory: Path, names: Sequence[str]) -> list[Document]:
    """The status documents of `names`, asked at the same time; a worker that fails to answer is "down"."""
    answers = all_at_once(names, lambda name: ask(run_directory, name, "query-status", timeout=STATUS_S))
    return [
        answer.result
        if answer.error is None
        else {"resource": answer.resource, "stage": "down", "error": str(answer.error)}
        for answer in answers
    ]


def _text(documents: Sequence[Document], detailed: bool) -> str:
    if detailed:
        return output.detail(documents[0])
    return output.table(documents) if documents else "no resources on this host"


def _json(documents: Sequence[Document], detailed: bool) -> str:
    import json

    return json.dumps(documents[0] if detailed else documents, indent=2)


def _watch(run_directory: Path, names: Sequence[str], *, detailed: bool, as_json: bool) -> None:
    """On a terminal redraw in place; elsewhere print what has changed."""
    before = ""
    try:
        while True:
            documents = fetch(run_directory, names)
            text = _json(documents, detailed) if as_json else _text(documents, detailed)
            if text != before:
                if not as_json:
                    click.clear()
                click.echo(text)
                before = text
            time.sleep(PERIOD_S)
    except KeyboardInterrupt:
        return
