"""What a change costs: the same rows of two revisions of ours, in turns: `python -m benchmarks.revisions OLD NEW`.

Each revision runs from a worktree of its own, with its own benchmarks, in this interpreter. The order alternates. What
counts is the median of the pairs' ratios, NEW to OLD, of the processor's time per request: other work on the machine
disturbs that least. A row without it (a pause) is compared by its value.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("old")
@click.argument("new")
@click.option(
    "--only", default="forwarded,lun,primary,pause,failover,ring", help="Groups, as of `benchmarks`."
)
@click.option("--scale", default="quick", type=click.Choice(["full", "quick", "tiny"]), help="How much work.")
@click.option("--pairs", default=5, help="How often both are measured.")
def main(old: str, new: str, only: str, scale: str, pairs: int) -> None:
    """Compare two revisions, in turns; ratios above 1 say that NEW costs more."""
    ratios: dict[str, list[float]] = {}
    with worktree(old) as before, worktree(new) as after, tempfile.TemporaryDirectory() as out:
        for number in range(pairs):
            order = [("old", before), ("new", after)]
            found = {
                side: measure(tree, Path(out, side), only, scale)
                for side, tree in (order if number % 2 else order[::-1])
            }
            for row in found["old"].keys() & found["new"].keys():
                ratios.setdefault(row, []).append(found["new"][row] / found["old"][row])
            click.echo(f"pair {number + 1} of {pairs}", err=True)
    click.echo("| row | ratio |\n|---|---|")
    for row, values in sorted(ratios.items()):
        click.echo(f"| {row} | {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}) |")


@contextlib.contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A checkout of `revision` for as long as the context lasts."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, revision], check=True)
        try:
            # Where an installation has them; else those of this checkout would be found.
            (tree / "tcmu_replication/handlers").symlink_to(tree / "handlers")
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], check=True)


def measure(tree: Path, out: Path, only: str, scale: str) -> dict[str, float]:
    """Of each row of ours, in a run of one round: the processor's time per request, or what the row shows."""
    command = [sys.executable, "-m", "benchmarks", "--scale", scale, "--rounds", "1", "--only", only]
    subprocess.run(
        [*command, f"--out={out}"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    rows: dict[str, Any] = json.loads((out / "results.json").read_text())["rows"]
    return {name: cost(row) for name, row in rows.items() if row["ours"]}


def cost(row: dict[str, Any]) -> float:
    """More is worse."""
    if row["ours"]["cpu_us"] is not None:
        return float(row["ours"]["cpu_us"])
    value = float(row["ours"]["value"])
    return value if row["row"]["better"] == "less" else 1 / value


if __name__ == "__main__":
    main()
