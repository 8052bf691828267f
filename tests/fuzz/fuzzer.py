"""One target under atheris, guided by coverage; `run` calls it in a process of its own.

    python -m tests.fuzz.fuzzer TARGET SECONDS FOLDER

New inputs go to FOLDER/TARGET, what fails to FOLDER/TARGET-crash-* (TARGET-timeout-*
after HANG_S, TARGET-oom-* beyond MEMORY_MB). Ends with another status than 0 then.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import atheris

from tests.fuzz import CORPUS

HANG_S = 10
MEMORY_MB = 1024


def main(name: str, seconds: str, folder: str) -> None:
    """Does not return."""
    with atheris.instrument_imports(include=["tcmu_replication"]):
        target = importlib.import_module(f"tests.fuzz.{name}")
    found = Path(folder) / name
    found.mkdir(parents=True, exist_ok=True)
    words = Path(folder) / f"{name}.dict"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.WORDS))
    options = {
        "dict": words,
        "max_total_time": seconds,
        "max_len": target.MAX_LENGTH,
        "timeout": HANG_S,
        "rss_limit_mb": MEMORY_MB,
        "artifact_prefix": f"{folder}/{name}-",
        "use_value_profile": 1,
        "print_final_stats": 1,
    }
    arguments = [f"-{option}={value}" for option, value in options.items()]
    atheris.Setup([sys.argv[0], *arguments, str(found), str(CORPUS / name)], target.check)
    atheris.Fuzz()


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


if __name__ == "__main__":
    main(*sys.argv[1:])
