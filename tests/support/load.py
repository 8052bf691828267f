"""A load that notices any wrong byte: fio on a LUN over NBD, until the test says that it is enough.

It lasts as long as what the test does meanwhile, on any machine.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support.tools import PATIENCE_S


class Load:
    """Random writes at `uri`, each read back soon after it was written; `options` are more of fio's.

    Runs in `directory`, one at a time. Without `verify` nothing is read back.
    """

    def __init__(self, directory: Path, uri: str, *options: str, verify: bool = True) -> None:
        self._enough = directory / "enough"
        verifying = ["--verify=crc32c", "--verify_backlog=256", "--verify_fatal=1", "--verify_state_save=0"]
        self._process = subprocess.Popen(
            ["fio", "--name=load", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bsrange=512-64k",
             "--blocksize_unaligned=0", "--iodepth=32", "--time_based", "--runtime=1h", "--randrepeat=0",
             f"--trigger-file={self._enough}", *(verifying if verify else []), *options],
            cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    @property
    def running(self) -> bool:
        """Whether it has not met an error yet."""
        return self._process.poll() is None

    def end(self) -> None:
        """End it; no write failed and no byte was wrong."""
        assert self.running, self._process.communicate()[0]
        self._enough.touch()
        output, _ = self._process.communicate(timeout=PATIENCE_S)
        self._enough.unlink(missing_ok=True)
        assert self._process.returncode == 0, output
        assert "err= 0" in output, output
