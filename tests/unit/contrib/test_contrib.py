"""What contrib/ offers fits the program: every key of a resource file, every command that is named."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import fields, replace

from tcmu_replication.cli.main import cli
from tcmu_replication.daemon import child, config, guardian
from tests.support.tools import requires

CONTRIB = Path(__file__).parents[3] / "contrib"
EXAMPLE = CONTRIB / "resources" / "disk0.toml"
UNITS = sorted((CONTRIB / "systemd").iterdir())
DAEMON = CONTRIB / "systemd" / "tcmu-replication.service"
WORKER = CONTRIB / "systemd" / "tcmu-replication-worker@.service"


def sections(unit: Path) -> configparser.ConfigParser:
    """What a unit file sets; of what it sets twice the last."""
    found = configparser.ConfigParser(interpolation=None, strict=False)
    found.optionxform = str  # type: ignore[assignment, method-assign]
    found.read(unit)
    return found


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


def test_every_unit_is_looked_at() -> None:
    assert UNITS == [WORKER, DAEMON]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_unit_runs_a_command_that_there_is(unit: Path) -> None:
    service = sections(unit)["Service"]
    program, command, *_ = service["ExecStart"].split()
    assert program == "tcmu-replication"
    assert command in cli.commands
    assert service["Type"] == "notify"


def test_units_give_up_a_program_that_is_silent_after_many_of_its_signs_of_life() -> None:
    assert float(sections(DAEMON)["Service"]["WatchdogSec"]) >= 10 * child.LOOK_S
    assert float(sections(WORKER)["Service"]["WatchdogSec"]) >= 10 * guardian.TURN_S


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_unit_is_never_given_up(unit: Path) -> None:
    """systemd's own limit, five starts within ten seconds, would leave a LUN without its worker for good."""
    assert sections(unit)["Unit"]["StartLimitIntervalSec"] == "0"
    assert "RestartPreventExitStatus" not in sections(unit)["Service"]


def test_user_of_the_workers_unit_is_one_that_sysusers_makes() -> None:
    lines = (CONTRIB / "sysusers.d" / "tcmu-replication.conf").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("u ")]
    assert users == [sections(WORKER)["Service"]["User"]]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
@requires("systemd-analyze")
def test_unit_is_understood_by_systemd(tmp_path: Path, unit: Path) -> None:
    """The program's own path is put in, since systemd looks for it and it may not be installed."""
    program = f"ExecStart={sys.executable} -m tcmu_replication"
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("ExecStart=tcmu-replication", program))
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True)
    assert unit.stem not in done.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
@requires("systemd-analyze")
def test_unit_is_hardened(unit: Path) -> None:
    """S4: systemd's own measure of what a service could do, at most 4.0 of 10."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=40", "--no-pager", str(unit)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_completion_offers_commands(tmp_path: Path) -> None:
    program = f"PATH={Path(sys.executable).parent}:$PATH; source {CONTRIB}/completion/tcmu-replication.bash; "
    program += (
        "COMP_WORDS=(tcmu-replication fail) COMP_CWORD=1; _tcmu_replication_completion tcmu-replication; "
    )
    program += 'echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "failover"
