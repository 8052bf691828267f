"""S1: a pair of real processes whose link has a shared secret. Without it nobody writes or learns anything."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tcmu_replication.nbd.protocol import NBD_MAGIC
from tcmu_replication.units import MiB
from tests.support.certificates import Authority
from tests.support.processes import SECRET, Pair
from tests.support.tools import PATIENCE_S, requires

pytestmark = requires("qemu-io", "nbdinfo", "openssl")

SIZE = 16 * MiB
LINK: dict[str, object] = {"reconnect-delay": 10.0, "timeout": 10.0}
OTHER = b"something else that is long enough\n"


def same(pair: Pair) -> bool:
    return pair.alpha.disk.read_bytes() == pair.beta.disk.read_bytes()


def test_replication_checkpoint_restart_and_failover(tmp_path: Path) -> None:
    with Pair(tmp_path, size=SIZE, link=LINK) as pair:
        pair.replicate()
        pair.alpha.io("write -P 0x22 0 4M")
        pair.alpha.cli("checkpoint", "disk0")
        pair.beta.kill()
        pair.beta.start()
        pair.alpha.io("write -P 0x33 2M 4M", "flush")
        assert pair.alpha.status()["error"] is None
        assert same(pair)
        pair.alpha.kill()
        pair.beta.cli("failover", "disk0", "--to", "checkpoint", "--fenced", "--wait")
        pair.beta.io("read -P 0x22 0 4M")


def local_user(pair: Pair, uid: int = 65534) -> subprocess.CompletedProcess[str]:
    """Somebody on the primary's host, and so with its address, who wants to write the secondary's disk."""
    uri = f"nbd://127.0.0.2:{pair.port}/disk0"
    command = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "qemu-io", "-f", "raw", uri]
    return subprocess.run(
        [*command, "-c", "write -P 0x66 0 64k"], capture_output=True, text=True, timeout=PATIENCE_S
    )


@requires("setpriv")
def test_local_user_of_the_primarys_host_writes_nothing_and_disturbs_nobody(tmp_path: Path) -> None:
    with Pair(tmp_path, size=SIZE, link=LINK) as pair:
        pair.replicate()
        pair.alpha.io("write -P 0x22 0 1M", "flush")
        before = pair.alpha.status()["link"]
        assert local_user(pair).returncode != 0
        after = pair.alpha.status()["link"]
        assert (after["state"], after["since"]) == ("connected", before["since"])
        assert same(pair)
        pair.alpha.cli("checkpoint", "disk0")


@requires("setpriv")
def test_bare_link_lets_a_local_user_write_as_the_warning_says(tmp_path: Path) -> None:
    with Pair(tmp_path, size=SIZE, link={**LINK, "trust": "address"}) as pair:
        pair.beta.cli("start", "disk0")
        warned = pair.alpha.cli("start", "disk0").stderr
        said = "the link is bare: anyone at 127.0.0.1 may write the disk of beta"
        assert f"warning: disk0: {said}" in warned
        assert said in pair.beta.log.read_text()
        assert "bare: anyone at 127.0.0.1 may write" in " ".join(pair.beta.cli("check").stdout.split())
        pair.alpha.kill()  # or it would take its place back
        assert local_user(pair).returncode == 0
        assert pair.beta.disk.read_bytes()[: 64 << 10] == b"\x66" * (64 << 10)


def test_both_ports_say_nothing_to_who_does_not_know_the_secret(tmp_path: Path) -> None:
    with Pair(tmp_path, size=SIZE, link=LINK) as pair:
        pair.replicate()
        for port in (pair.port, pair.control_port):
            with socket.create_connection(("127.0.0.2", port), source_address=("127.0.0.1", 0)) as sock:
                sock.settimeout(PATIENCE_S)
                sock.sendall(json.dumps({"execute": "qmp_capabilities"}).encode() + b"\n")
                heard = b""
                try:
                    while piece := sock.recv(4096):
                        heard += piece
                except ConnectionResetError:
                    pass
            assert len(heard) <= 40
            for word in (b"QMP", b"disk0", NBD_MAGIC.to_bytes(8)):
                assert word not in heard
        pair.alpha.cli("checkpoint", "disk0")


def refused(pair: Pair) -> str:
    """What alpha says of a start that must fail, with beta ready for it."""
    with pair:
        pair.beta.cli("start", "disk0")
        done = pair.alpha.cli("start", "disk0", check=False)
        assert done.returncode != 0
        assert pair.alpha.status()["stage"] == "none"
    return done.stderr


def bare(pair: Pair, host: str) -> Pair:
    """Make that end say that it trusts the address."""
    file = getattr(pair, host).directory / "etc/disk0.toml"
    file.write_text(file.read_text().replace("[link]\n", '[link]\ntrust = "address"\n'))
    return pair


WRONG: dict[str, tuple[dict[str, bytes], str]] = {
    "only the secondary has one": ({"beta": SECRET}, "asks for a shared secret, and this end has none"),
    "only the primary has one": ({"alpha": SECRET}, "knows of no shared secret, and this end has one"),
    "they differ": ({"alpha": SECRET, "beta": OTHER}, "the shared secrets of the two ends differ"),
}


@pytest.mark.parametrize("row", WRONG)
def test_ends_that_do_not_agree_say_which_lacks_what(tmp_path: Path, row: str) -> None:
    secrets, said = WRONG[row]
    pair = Pair(tmp_path, size=SIZE, link=LINK, secrets=secrets)
    for host in {"alpha", "beta"} - set(secrets):
        bare(pair, host)
    assert said in refused(pair)


IN_TLS: dict[str, tuple[dict[str, bytes], str]] = {
    "only the secondary has one": ({"beta": SECRET}, "or asks for a shared secret first"),
    "only the primary has one": ({"alpha": SECRET}, "`secret` may be missing there"),
    "they differ": ({"alpha": SECRET, "beta": OTHER}, "the shared secrets of the two ends differ"),
}


@pytest.fixture
def certificates(tmp_path: Path) -> dict[str, Path]:
    authority = Authority(tmp_path)
    return {
        host: authority.issue(tmp_path / f"tls-{host}", address)
        for host, address in (("alpha", "127.0.0.1"), ("beta", "127.0.0.2"))
    }


@pytest.mark.parametrize("row", IN_TLS)
def test_ends_with_tls_that_do_not_agree_say_which_lacks_what(
    tmp_path: Path, certificates: dict[str, Path], row: str
) -> None:
    secrets, said = IN_TLS[row]
    assert said in refused(Pair(tmp_path, size=SIZE, link=LINK, certificates=certificates, secrets=secrets))


def test_secret_and_tls_together(tmp_path: Path, certificates: dict[str, Path]) -> None:
    secrets = {"alpha": SECRET, "beta": SECRET}
    with Pair(tmp_path, size=SIZE, link=LINK, certificates=certificates, secrets=secrets) as pair:
        pair.replicate()
        pair.alpha.io("write -P 0x22 0 1M", "flush")
        pair.alpha.cli("checkpoint", "disk0")
        pair.beta.io("read -P 0x22 0 1M")


def test_new_secret_on_both_hosts_needs_no_restart(tmp_path: Path) -> None:
    with Pair(tmp_path, size=SIZE, link=LINK) as pair:
        pair.replicate()
        for worker in (pair.alpha, pair.beta):
            worker.secret.write_bytes(OTHER)
        pair.beta.kill()
        pair.beta.start()
        pair.alpha.io("write -P 0x22 0 1M", "flush")
        assert pair.alpha.status()["error"] is None
        assert same(pair)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "(No such file or directory); expected `(umask 077"),
    "for others to read": (lambda path: path.chmod(0o644), "with mode 0644, so that others may read it"),
    "too short": (lambda path: path.write_bytes(b"short\n"), "of 5 bytes; expected 16 to 4096 bytes"),
}


@pytest.mark.parametrize("row", BROKEN)
def test_file_that_is_no_good_keeps_the_worker_from_starting_and_is_named(tmp_path: Path, row: str) -> None:
    breaking, said = BROKEN[row]
    pair = Pair(tmp_path, size=SIZE, link=LINK)
    breaking(pair.beta.secret)
    for command in (["serve", "disk0"], ["check"]):
        done = pair.beta.cli(*command, check=False)
        assert done.returncode == 2
        assert "link.secret: found" in done.stderr
        assert said in done.stderr
