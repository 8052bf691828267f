"""A worker of this version whose other host is of the version before: they stay connected and replicate."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tcmu_replication import __version__
from tcmu_replication.control.protocol import SPOKEN
from tcmu_replication.units import MiB
from tests.support import protocol_2
from tests.support.processes import Pair
from tests.support.tools import PATIENCE_S, requires, until

pytestmark = [pytest.mark.interop, requires("qemu-nbd", "qemu-io")]

SIZE = 8 * MiB
LINK: dict[str, object] = {"reconnect-delay": 10.0, "timeout": 10.0, "trust": "address"}
OLD = {"protocol": 2, "version": None, "refusal": None}


@contextmanager
def exported(image: Path, port: int) -> Iterator[None]:
    """What the old secondary serves over NBD."""
    words = [
        "qemu-nbd",
        "-f",
        "raw",
        "-b",
        "127.0.0.2",
        "-p",
        str(port),
        "-x",
        "disk0",
        "-t",
        "-e",
        "8",
        str(image),
    ]
    process = subprocess.Popen(words)
    try:
        uri = f"nbd://127.0.0.2:{port}/disk0"
        end_s = time.monotonic() + PATIENCE_S
        while subprocess.run(
            ["qemu-io", "-r", "-f", "raw", uri, "-c", "quit"], capture_output=True
        ).returncode:
            assert process.poll() is None
            assert time.monotonic() < end_s
        yield
    finally:
        process.kill()
        process.wait()


def test_secondary_of_the_version_before_gets_every_write_and_checkpoint(tmp_path: Path) -> None:
    pair = Pair(tmp_path, size=SIZE, link=LINK)
    alpha, image = pair.alpha, pair.beta.disk
    with protocol_2.Secondary("127.0.0.2", pair.control_port, SIZE) as old, exported(image, pair.port):
        alpha.start()
        try:
            alpha.cli("start", "disk0", "--wait")
            alpha.io("write -P 0x11 0 1M", "flush")
            alpha.cli("checkpoint", "disk0")
            alpha.io("write -P 0x22 2M 1M", "flush")
            assert pair.equal
            status = alpha.status()
            assert (status["epoch"], status["error"]) == (2, None)
            assert status["protection"]["protected"]
            assert status["peer-software"] == OLD
            assert "protocol 2" in alpha.cli("status", "disk0").stdout
            heard = len(old.hellos)
            until(lambda: len(old.hellos) > heard + 1, "it goes on saying hello")
            # Nothing was refused but the greeting, once for each connection.
            assert {answer.partition(b',"data"')[0] for answer in old.refused} == {
                b'{"error":{"class":"CommandNotFound","desc":"The command peer-greet has not been found"'
            }
            assert {hello["protocol"] for hello in old.hellos} == {2}
            assert {command for command, _ in old.asked} == {"peer-greet", *protocol_2.TAKES}
            assert alpha.status()["protection"]["protected"]
        finally:
            alpha.stop()


STATE = (
    rb'\{"return":\{"stage":"running","epoch":%d,"generation":"(?P<generation>[0-9a-f-]{36})","length":8388608,'
    rb'"error":null,"checkpoint-name":"%s","paired":%s,"promoted-at":"","settled":%d\}\}'
)


def test_primary_of_the_version_before_is_answered_byte_for_byte_as_it_was(tmp_path: Path) -> None:
    pair = Pair(tmp_path, size=SIZE, link=LINK)
    beta = pair.beta
    beta.start()
    try:
        beta.cli("start", "disk0")
        with protocol_2.Primary("127.0.0.1", "127.0.0.2", pair.control_port) as old:
            hello = '{"resource":"disk0","protocol":2,"settled":true,"verified":%s%s}'
            answer = old.ask("peer-hello", hello % ("false", ""))
            found = re.fullmatch(STATE % (1, b"", b"false", 1), answer)
            assert found, answer
            mine = f',"generation":"{found["generation"].decode()}"'
            answer = old.ask("peer-hello", hello % ("true", mine))
            assert re.fullmatch(STATE % (1, b"", b"true", 2), answer), answer
            link = f"nbd://127.0.0.2:{pair.port}/disk0"
            write = ["qemu-io", "-f", "raw", link, "-c", "write -P 0x11 0 1M", "-c", "flush"]
            subprocess.run(write, check=True, capture_output=True, timeout=PATIENCE_S)
            assert old.ask("peer-prepare", '{"epoch":1}') == b'{"return":{}}'
            name = "322582d0-7876-4a35-bfce-ef20e25bff88"
            answer = old.ask("peer-checkpoint", f'{{"epoch":1,"name":"{name}","settled":2}}')
            assert re.fullmatch(STATE % (2, name.encode(), b"true", 2), answer), answer
            digests = json.loads(old.ask("peer-digests", '{"offset":0,"length":4194304,"piece":2097152}'))
            assert [len(digest) for digest in digests["return"]["digests"]] == [64, 0]
            status = beta.status()
            assert status["peer-software"] == OLD
            assert status["last-checkpoint"]["epoch"] == 2
        beta.io("read -P 0x11 0 1M")
    finally:
        beta.stop()


def test_hosts_of_one_version_show_each_others(tmp_path: Path) -> None:
    with Pair(tmp_path, size=SIZE, link=LINK) as pair:
        pair.replicate()
        for worker, peer in ((pair.alpha, "beta"), (pair.beta, "alpha")):
            assert worker.status()["peer-software"] == {
                "protocol": SPOKEN.highest,
                "version": __version__,
                "refusal": None,
            }
            assert (
                f"{peer}, version {__version__}, protocol {SPOKEN.highest}"
                in worker.cli("status", "disk0").stdout
            )


class Later(protocol_2.Secondary):
    """One of a version that speaks protocols 7 to 9 alone."""

    def answer(self, command: str, arguments: dict[str, Any], id: int) -> bytes:
        if command != "peer-greet":
            return super().answer(command, arguments, id)
        self.asked.append((command, arguments))
        return b'{"return":{"lowest":7,"highest":9,"version":"7.8.9"},"id":%d}\r\n' % id


NONE_IN_COMMON = (
    f"the hosts have no protocol in common: {{me}} (version {__version__}) speaks {SPOKEN}, {{peer}} (version 7.8.9) "
    "speaks protocols 7 to 9; upgrade tcmu-replication on {me}"
)


def test_secondary_of_a_version_without_a_common_protocol_is_refused_and_gets_nothing(tmp_path: Path) -> None:
    pair = Pair(tmp_path, size=SIZE, link=LINK)
    alpha, image = pair.alpha, pair.beta.disk
    with Later("127.0.0.2", pair.control_port, SIZE) as later, exported(image, pair.port):
        alpha.start()
        try:
            refused = alpha.cli("start", "disk0", check=False)
            assert refused.returncode != 0
            said = NONE_IN_COMMON.format(me="alpha", peer="beta")
            assert said in " ".join(refused.stderr.split())
            assert alpha.status()["peer-software"] == {"protocol": None, "version": "7.8.9", "refusal": said}
            assert said in " ".join(alpha.cli("status", "disk0", check=False).stdout.split())
            assert {command for command, _ in later.asked} == {"peer-greet"}
            assert image.read_bytes() == bytes(SIZE)
        finally:
            alpha.stop()


def test_primary_of_a_version_without_a_common_protocol_is_refused_and_changes_nothing(
    tmp_path: Path,
) -> None:
    pair = Pair(tmp_path, size=SIZE, link=LINK)
    beta = pair.beta
    beta.start()
    try:
        beta.cli("start", "disk0")
        before = (beta.overlays / "manifest").read_bytes()
        with protocol_2.Primary("127.0.0.1", "127.0.0.2", pair.control_port) as later:
            mine = '{"lowest":7,"highest":9,"version":"7.8.9"}'
            theirs = json.loads(later.ask("peer-greet", mine))["return"]
            assert theirs == {"lowest": SPOKEN.lowest, "highest": SPOKEN.highest, "version": __version__}
            said = NONE_IN_COMMON.format(me="beta", peer="alpha")
            hello = later.ask("peer-hello", '{"resource":"disk0","protocol":7}')
            assert json.loads(hello)["error"]["desc"] == said
            assert beta.status()["peer-software"] == {"protocol": None, "version": "7.8.9", "refusal": said}
        assert (beta.overlays / "manifest").read_bytes() == before
    finally:
        beta.stop()


def as_the_version_before(overlays: Path, **changes: object) -> None:
    """Make the manifest of a stopped worker one of format 2, which said no version."""
    path = overlays / "manifest"
    body = path.read_bytes()[: len(path.read_bytes()) // 2].split(b"\n")[1]
    members = {name: value for name, value in json.loads(body).items() if name != "version"}
    line = json.dumps({**members, "format": 2, **changes}).encode()
    place = hashlib.sha256(line).hexdigest().encode() + b"\n" + line + b"\n"
    path.write_bytes(place.ljust(16384, b"\0") * 2)


def test_directories_of_the_version_before_are_taken_up_one_host_after_the_other(tmp_path: Path) -> None:
    with Pair(tmp_path, size=SIZE, link=LINK) as pair:
        pair.replicate()
        pair.alpha.io("write -P 0x11 0 1M", "flush")
        pair.alpha.cli("checkpoint", "disk0")
        for number, worker in enumerate((pair.beta, pair.alpha), 2):
            worker.stop()
            as_the_version_before(worker.overlays)
            worker.start()
            assert "the manifest of format 2 is one of format" in worker.log.read_text()
            pair.alpha.io(f"write -P 0x{number}{number} {number}M 1M", "flush")
            assert pair.equal
        pair.alpha.cli("checkpoint", "disk0")
        for worker in (pair.alpha, pair.beta):
            status = worker.status()
            assert (status["epoch"], status["error"]) == (3, None)


def test_directory_of_a_later_version_is_refused_by_name_and_left_as_it_is(tmp_path: Path) -> None:
    with Pair(tmp_path, size=SIZE, link=LINK) as pair:
        pair.replicate()
        pair.beta.stop()
        as_the_version_before(pair.beta.overlays, format=99, version="7.8.9")
        before = {path: path.read_bytes() for path in pair.beta.overlays.iterdir()}
        said = pair.beta.refuse_to_start()
        assert "found format 99, written by tcmu-replication 7.8.9" in said
        assert "run version 7.8.9 or a newer one" in said
        assert {path: path.read_bytes() for path in pair.beta.overlays.iterdir()} == before
