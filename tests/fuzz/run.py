"""`make fuzz`: every target for a while, as many at a time as there are processors, and a table of the outcome.

    python -m tests.fuzz.run SECONDS [TARGET...]

What is found is kept in fuzz-work/, each target's output beside it. Ends with 1 if any target failed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fuzz import TARGETS

FOLDER = Path("fuzz-work")
_ROW = "{:<22} {:>10} {:>9} {:>7}  {}"


def fuzz(target: str, seconds: str) -> bool:
    """Run one target and print its row; whether all was well."""
    log = FOLDER / f"{target}.log"
    command = [sys.executable, "-m", "tests.fuzz.fuzzer", target, seconds, str(FOLDER)]
    with open(log, "wb") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
    text = log.read_text(errors="replace")
    runs = _last(r"number_of_executed_units: (\d+)", text)
    covered = _last(r"cov: (\d+)", text)
    inputs = _last(r"corp: (\d+)", text)
    outcome = "ok" if status == 0 else f"FAILED ({status}): see {log}"
    print(_ROW.format(target, runs, covered, inputs, outcome), flush=True)
    return status == 0


def _last(pattern: str, text: str) -> str:
    found = re.findall(pattern, text)
    return found[-1] if found else "?"


def main(seconds: str, *targets: str) -> int:
    """The exit status."""
    FOLDER.mkdir(exist_ok=True)
    print(_ROW.format("target", "runs", "branches", "inputs", "outcome"), flush=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        fine = list(pool.map(lambda target: fuzz(target, seconds), targets or TARGETS))
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
