"""A pair of real processes with TLS between them: it works as without, and without the certificate nothing does."""

import json
import shutil
import socket
import subprocess
import time

import pytest

from tcmu_replication.units import MiB
from tests.support.certificates import PAST, Authority
from tests.support.load import Load
from tests.support.processes import HOSTS, SECRET, Pair
from tests.support.tools import PATIENCE_S, requires

pytestmark = requires("qemu-io", "fio", "openssl", "nbdinfo")

SIZE = 64 * MiB
LINK = {"reconnect-delay": 14.0, "timeout": 10.0}


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


@pytest.fixture
def certificates(tmp_path, authority):
    """A directory for each host: alpha's names its address, beta's its name."""
    return {
        "alpha": authority.issue(tmp_path / "tls-alpha", "127.0.0.1"),
        "beta": authority.issue(tmp_path / "tls-beta", "beta"),
    }


@pytest.fixture
def pair(tmp_path, certificates):
    with Pair(tmp_path, size=SIZE, link=LINK, certificates=certificates) as pair:
        pair.certificates = certificates
        yield pair


def ports(pair):
    """The link's port and the control port."""
    text = (pair.alpha.directory / "etc/disk0.toml").read_text()
    found = dict(line.split(" = ") for line in text.splitlines() if " = " in line)
    return int(found["port"]), int(found["control-port"])


def same(pair):
    return pair.alpha.disk.read_bytes() == pair.beta.disk.read_bytes()


def test_replication_checkpoint_and_failover_inside_of_tls(pair):
    pair.replicate()
    pair.alpha.io("write -P 0x22 0 8M")
    pair.alpha.cli("checkpoint", "disk0")
    pair.alpha.io("write -P 0x33 4M 8M")
    assert same(pair)
    pair.beta.io("read -P 0x22 0 8M", "read -P 0 8M 8M")
    pair.beta.cli("failover", "disk0", "--to", "checkpoint", "--force", "--wait")
    pair.beta.io("read -P 0x22 0 8M", "read -P 0 8M 8M")


def test_secondary_killed_under_load_is_reached_again_inside_of_tls(pair):
    pair.replicate()
    load = Load(pair.alpha.directory, pair.alpha.uri, "--size=48M", "--bsrange=512-256k")
    deadline = time.monotonic() + PATIENCE_S
    while pair.beta.status()["overlays"]["hidden-bytes"] < MiB:
        assert time.monotonic() < deadline
    pair.beta.kill()
    pair.beta.start()
    load.end()
    status = pair.alpha.status()
    assert (status["error"], status["out-of-sync-bytes"]) == (None, 0)
    assert same(pair)
    pair.alpha.cli("checkpoint", "disk0")


def test_new_certificates_need_no_restart(pair, authority):
    pair.replicate()
    for host, name in (("alpha", "alpha"), ("beta", "127.0.0.2")):
        authority.issue(pair.certificates[host], name)
    pair.beta.kill()
    pair.beta.start()
    pair.alpha.io("write -P 0x22 0 8M")
    assert pair.alpha.status()["error"] is None
    pair.alpha.cli("checkpoint", "disk0")
    pair.beta.io("read -P 0x22 0 8M")


WRONG = {
    "another CA": "not signed by our CA",
    "another host": "names gamma, and not 127.0.0.2 or beta",
    "expired": "has expired",
}


@pytest.mark.parametrize("row", WRONG)
def test_secondary_with_the_wrong_certificate_is_refused(tmp_path, authority, certificates, row):
    wrong = certificates["beta"]
    if row == "another CA":
        ca = (wrong / "ca-cert.pem").read_bytes()
        Authority(tmp_path, "other").issue(wrong, "beta")
        (wrong / "ca-cert.pem").write_bytes(ca)
    elif row == "another host":
        authority.issue(wrong, "gamma")
    else:
        authority.issue(wrong, "beta", valid=PAST)
    with Pair(tmp_path, size=SIZE, link=LINK, certificates=certificates) as pair:
        pair.beta.cli("start", "disk0")
        refused = pair.alpha.cli("start", "disk0", check=False)
        assert refused.returncode != 0
        assert WRONG[row] in refused.stderr
        assert pair.alpha.status()["stage"] == "none"
        check = pair.beta.cli("check", check=False)
        assert check.returncode == 2
        assert f"{wrong}/server-cert.pem: the peer will refuse it: its certificate" in check.stderr


def test_primary_with_the_wrong_certificate_is_refused_and_the_secondary_says_why(
    tmp_path, authority, certificates
):
    authority.issue(certificates["alpha"], "gamma")
    with Pair(tmp_path, size=SIZE, link=LINK, certificates=certificates) as pair:
        pair.beta.cli("start", "disk0")
        refused = pair.alpha.cli("start", "disk0", check=False)
        assert refused.returncode != 0
        assert pair.alpha.status()["stage"] == "none"
        said = "a client of the control port was refused: its certificate names gamma"
        deadline = time.monotonic() + PATIENCE_S
        while said not in pair.beta.log.read_text():  # it may say so only after alpha has heard it
            assert time.monotonic() < deadline, pair.beta.log.read_text()
            time.sleep(0.02)


@pytest.mark.parametrize("bare", ["alpha", "beta"])
def test_only_one_end_with_tls_is_refused(tmp_path, certificates, bare):
    del certificates[bare]
    secrets = dict.fromkeys(HOSTS, SECRET)
    with Pair(tmp_path, size=SIZE, link=LINK, certificates=certificates, secrets=secrets) as pair:
        pair.beta.cli("start", "disk0")
        refused = pair.alpha.cli("start", "disk0", check=False)
        assert refused.returncode != 0
        if bare == "beta":
            assert "does not speak TLS" in refused.stderr


def test_both_ports_say_nothing_to_who_has_no_certificate(pair):
    pair.replicate()
    link, control = ports(pair)
    for command in (["nbdinfo", "--list"], ["nbdinfo"]):
        done = subprocess.run([*command, f"nbd://127.0.0.2:{link}/disk0"], capture_output=True, text=True)
        assert done.returncode != 0
        assert str(SIZE) not in done.stdout
    with socket.create_connection(("127.0.0.2", control), source_address=("127.0.0.1", 0)) as sock:
        sock.settimeout(PATIENCE_S)
        sock.sendall(json.dumps({"execute": "qmp_capabilities"}).encode() + b"\n")
        answer = sock.recv(4096)  # an alert, or nothing
        assert b"QMP" not in answer
        assert b"return" not in answer
    pair.alpha.io("write -P 0x22 0 1M")
    pair.alpha.cli("checkpoint", "disk0")


def test_lun_over_tcp_is_inside_of_tls_too(tmp_path, certificates):
    with Pair(tmp_path, size=SIZE, link=LINK, certificates=certificates) as pair:
        pair.alpha.stop()
        file = pair.alpha.directory / "etc/disk0.toml"
        port = ports(pair)[1]  # the secondary's, on another address
        file.write_text(file.read_text().replace(f"unix:{pair.alpha.socket}", f"127.0.0.1:{port}"))
        pair.alpha.start()
        plain = subprocess.run(["nbdinfo", f"nbd://127.0.0.1:{port}/disk0"], capture_output=True, text=True)
        assert plain.returncode != 0
        uri = f"nbds://127.0.0.1:{port}/disk0?tls-certificates={certificates['alpha']}"
        done = subprocess.run(["nbdinfo", "--json", uri], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["exports"][0]["export-size"] == SIZE


def test_missing_file_keeps_the_worker_from_starting_and_is_named(tmp_path, certificates):
    shutil.copytree(certificates["beta"], tmp_path / "less")
    (tmp_path / "less/server-key.pem").unlink()
    pair = Pair(tmp_path, size=SIZE, link=LINK, certificates={"beta": tmp_path / "less"})
    refused = pair.beta.cli("serve", "disk0", check=False)
    assert refused.returncode != 0
    assert "less/server-key.pem: No such file or directory" in refused.stderr
