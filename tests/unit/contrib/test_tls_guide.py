"""The commands of docs/tls.md make certificates that both hosts believe."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tcmu_replication import tls
from tests.support.tools import requires

GUIDE = Path(__file__).parents[3] / "docs" / "tls.md"


@requires("openssl")
def test_commands_of_the_guide_make_files_that_the_peer_believes(tmp_path: Path) -> None:
    (block,) = re.findall(r"(?:^    .*\n|^\n)*^    issue beta .*\n", GUIDE.read_text(), flags=re.MULTILINE)
    script = "".join(line[4:] or "\n" for line in block.splitlines(keepends=True))
    done = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for host, address in (("alpha", "192.0.2.1"), ("beta", "192.0.2.2")):
        files = {path.name for path in (tmp_path / host).iterdir()}
        kinds = {f"{role}-{kind}.pem" for role in ("server", "client") for kind in ("cert", "key")}
        assert files == {"ca-cert.pem", *kinds}
        for name in (host, address):
            tls.rehearse(str(tmp_path / host), [name])
