"""`make demo`: tells the story of a replicated LUN on real kernels, and checks every byte of it.

    python -m tests.lab.demo --to latest|checkpoint [--logs FOLDER]

Exit status 0 if all of it was right, 1 if not, 2 if this machine cannot run
it. Each host's console and commands stay in the logs' folder.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time

import rich.box
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

from tests.lab import pair
from tests.lab.host import REPOSITORY
from tests.lab.lab import Lab, missing_tools
from tests.lab.story import Ending, Story

INTRODUCTION = """\
Three hosts, each a real Linux kernel (user-mode Linux) with its own disks and a private network:
[bold]alpha[/] holds the primary of a replicated disk, [bold]beta[/] the secondary, [bold]client[/] uses it over iSCSI.
"""
WIDTH = 110


class Board:
    """The table that grows as the story goes on."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._done: list[tuple[str, str, str, str, str]] = []
        self._now: tuple[str, float] | None = None

    def begin(self, title: str) -> None:
        """A chapter begins."""
        self._now = title, time.monotonic()

    def end(self, seen: str, mark: str = "[green]ok[/]") -> None:
        """The chapter that began is over; `seen` is what it showed."""
        assert self._now is not None
        title, began = self._now
        now = time.monotonic()
        row = str(len(self._done) + 1), title, f"{now - began:.1f} s", f"{now - self._began:.0f} s", mark
        self._done.append((row[0], f"{title}\n[dim]{seen}[/]" if seen else title, *row[2:]))
        self._now = None

    def __rich__(self) -> Table:
        table = Table(box=rich.box.SIMPLE_HEAD, width=WIDTH)
        table.add_column("", justify="right", style="bold cyan")
        table.add_column("What happens", ratio=1)
        table.add_column("took", justify="right", style="cyan")
        table.add_column("at", justify="right", style="dim")
        table.add_column("", justify="center")
        for row in self._done:
            table.add_row(*row)
        if self._now is not None:
            title, began = self._now
            elapsed = f"{time.monotonic() - began:.1f} s"
            table.add_row(str(len(self._done) + 1), title, elapsed, "", Spinner("dots"))
        return table


def main() -> int:
    """Runs the story as the command line says; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.demo", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--to", choices=("latest", "checkpoint"), default="latest", help="what the failover is to"
    )
    parser.add_argument("--logs", type=pathlib.Path, help="where each host's console and commands go")
    arguments = parser.parse_args()
    logs = arguments.logs or REPOSITORY / "lab-logs" / time.strftime("demo-%Y%m%d-%H%M%S")
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    lacking = [*missing_tools(), *([] if os.geteuid() == 0 else ["root"])]
    if lacking:
        console.print(f"The demo needs {', '.join(lacking)}; [bold]make demo[/] as root installs the tools.")
        return 2
    console.print(INTRODUCTION)
    error = tell(console, arguments.to, logs)
    console.print()
    if error is None:
        console.print("[bold green]Every byte is where it should be.[/]")
    else:
        console.print(f"[bold red]{type(error).__name__}:[/] ", end="")
        console.print(str(error), markup=False)
    console.print(f"Each host's console and commands: {logs}", markup=False, soft_wrap=True)
    return 0 if error is None else 1


def tell(console: Console, ending: Ending, logs: pathlib.Path) -> Exception | None:
    """Tells the story on `console`; the error that ended it early, if one did."""
    board = Board()
    with Lab(logs) as lab, Live(board, console=console, refresh_per_second=8):
        pair.describe(lab)
        try:
            for title, happen in Story(lab, ending).chapters():
                board.begin(title)
                board.end(happen())
        except Exception as e:  # whatever it is ends the story; the person gets it, with the logs' folder
            board.end("", mark="[red]failed[/]")
            return e
    return None


if __name__ == "__main__":
    sys.exit(main())
