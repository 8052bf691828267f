"""Options come before the environment, and that before the defaults."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tcmu_replication.daemon import places

ROWS = [
    (places.config_directory, "TCMU_REPLICATION_CONFIG", Path("/etc/tcmu-replication"), Path),
    (places.run_directory, "TCMU_REPLICATION_RUN", Path("/run/tcmu-replication"), Path),
    (places.this_host, "TCMU_REPLICATION_HOST", os.uname().nodename, str),
]


@pytest.mark.parametrize(("place", "variable", "default", "kind"), ROWS, ids=[row[1] for row in ROWS])
def test_option_then_environment_then_default(
    monkeypatch: pytest.MonkeyPatch,
    place: Callable[[str | None], object],
    variable: str,
    default: object,
    kind: Callable[[str], object],
) -> None:
    monkeypatch.delenv(variable, raising=False)
    assert place(None) == default
    monkeypatch.setenv(variable, "/a")
    assert place(None) == kind("/a")
    assert place("/b") == kind("/b")
