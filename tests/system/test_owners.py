"""Whoever else could change what a worker relies on keeps it from starting (S5), as root and as somebody else."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcmu_replication.units import MiB
from tests.support.processes import Pair
from tests.support.tools import requires

pytestmark = requires("qemu-io")

SIZE = 16 * MiB
SOMEBODY = 4_000_001
"""A user that no machine has."""


@pytest.mark.parametrize("what", ["disk", "overlays", "run", "etc/disk0.toml"])
def test_worker_of_what_others_may_write_does_not_start(tmp_path: Path, what: str) -> None:
    beta = Pair(tmp_path, size=SIZE).beta
    path = {"disk": beta.disk, "overlays": beta.overlays}.get(what, beta.directory / what)
    if what == "run":
        path.mkdir()
    path.chmod(0o777)
    for words in (("serve", "disk0"), ("check",)):
        if what == "run" and words == ("check",):
            continue  # whoever runs it may name any directory; the worker refuses it
        refused = beta.cli(*words, check=False)
        assert refused.returncode == 2, refused
        assert f"found {path} with mode 0777, so that others may write it" in refused.stderr
        assert f"chmod go-w {path}" in refused.stderr
    path.chmod(0o755)
    beta.start()
    beta.stop()


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory that everybody can reach, unlike pytest's."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
@pytest.mark.parametrize("reads", ["its own files", "root's files, as its group"])
def test_secondary_as_a_user_of_its_own(base: Path, reads: str) -> None:
    """As contrib's unit of a worker without LIO runs one (S4)."""
    pair = Pair(base, size=SIZE)
    beta = pair.beta
    beta.user = SOMEBODY
    for path in (beta.directory, beta.disk, beta.overlays, beta.secret):
        os.chown(path, SOMEBODY, SOMEBODY)
    if reads == "root's files, as its group":
        os.chown(beta.secret, 0, SOMEBODY)
        beta.secret.chmod(0o640)
    told = beta.cli("check", check=False)
    assert f"of a worker that runs as user {SOMEBODY}, ask as that user" in told.stderr
    assert beta.cli("check", user=SOMEBODY).returncode == 0
    with pair:
        pair.replicate()
        pair.alpha.io("write -P 0x22 0 1M", "flush")
        pair.alpha.cli("checkpoint", "disk0")
        beta.io("read -P 0x22 0 1M")
        assert {path.stat().st_uid for path in beta.overlays.iterdir()} == {SOMEBODY}
