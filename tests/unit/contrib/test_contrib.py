"""What contrib/ offers fits the program: every key of a resource file, every command that is named."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import fields, replace

from tcmu_replication.cli.main import cli
from tcmu_replication.daemon import config

CONTRIB = Path(__file__).parents[3] / "contrib"
EXAMPLE = CONTRIB / "resources" / "disk0.toml"


def test_example_is_a_good_resource_file_with_the_defaults() -> None:
    resource = config.load(EXAMPLE)
    assert resource.link == config.Link(secret="/etc/tcmu-replication/disk0.secret")
    assert (resource.block_size, resource.durable, resource.nbd) == (512, True, None)


def test_example_names_every_key_and_its_default(tmp_path: Path) -> None:
    """With the comment marks off it is a good file too, and says what the program would have taken."""
    path = tmp_path / "disk0.toml"
    path.write_text(re.sub(r"^#(?=[a-z\[])", "", EXAMPLE.read_text(), flags=re.MULTILINE))
    plain, full = config.load(EXAMPLE), config.load(path)
    without_default = {"path", "failover", "serial", "overlay_limit", "nbd", "tls"}
    assert full.link.socket
    full = replace(full, link=replace(full.link, socket=None))
    for row in fields(config.Resource):
        if row.name in without_default:
            assert getattr(full, row.name), row.name
        else:
            assert getattr(full, row.name) == getattr(plain, row.name), row.name
    named = set(re.findall(r"^#?([a-z-]+) = ", EXAMPLE.read_text(), flags=re.MULTILINE))
    kinds = (config.Resource, config.Link, config.Host, config.Nbd, config.Tls)
    assert named == {row.encode_name for kind in kinds for row in fields(kind)} - {
        "path",
        "link",
        "hosts",
        "nbd",
        "tls",
        "qemu",  # the other host's, and in its comment
        "trust",  # instead of the secret, and in its comment
        "open",  # for a LUN over TCP, and in its comment
    }


def test_unit_runs_a_command_that_there_is() -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment]
    unit.read(CONTRIB / "systemd" / "tcmu-replication.service")
    program, command = unit["Service"]["ExecStart"].split()
    assert program == "tcmu-replication"
    assert command in cli.commands
    assert unit["Service"]["Type"] == "notify"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_unit_is_understood_by_systemd(tmp_path: Path) -> None:
    """The program's own path is put in, since systemd looks for it and it may not be installed."""
    unit = tmp_path / "tcmu-replication.service"
    text = (CONTRIB / "systemd" / "tcmu-replication.service").read_text()
    unit.write_text(
        text.replace("ExecStart=tcmu-replication", f"ExecStart={sys.executable} -m tcmu_replication")
    )
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert unit.name not in done.stderr


def test_completion_offers_commands(tmp_path: Path) -> None:
    program = f"PATH={Path(sys.executable).parent}:$PATH; source {CONTRIB}/completion/tcmu-replication.bash; "
    program += (
        "COMP_WORDS=(tcmu-replication fail) COMP_CWORD=1; _tcmu_replication_completion tcmu-replication; "
    )
    program += 'echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "failover"
