"""TLS contexts: who is believed, what the files must be, and the sentence for everything that is wrong."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tcmu_replication.errors import Error, Kind
from tcmu_replication.tls import Context, rehearse, sentence
from tests.support.certificates import FUTURE, PAST, Authority
from tests.support.tools import requires

pytestmark = requires("openssl")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two CAs, and directories of hosts."""
    base = tmp_path_factory.mktemp("tls")
    ours, theirs = Authority(base), Authority(base, "other")
    ours.issue(base / "alpha", "alpha", "192.0.2.1")
    ours.issue(base / "beta", "BETA.", "2001:db8::2")
    ours.issue(base / "nameless")
    ours.issue(base / "expired", "beta", valid=PAST)
    ours.issue(base / "early", "beta", valid=FUTURE)
    theirs.issue(base / "stranger", "beta")
    shutil.copy(base / "beta/ca-cert.pem", base / "stranger")
    shutil.copytree(base / "beta", base / "swapped")
    for role, usage in (("server", "clientAuth"), ("client", "serverAuth")):
        ours.issue_one(base / "swapped", role, "beta", usage=usage)
    return base


def shake(server: Context, client: ssl.SSLContext) -> tuple[str, str]:
    """How the server's and the client's handshake ended: "" or the sentence; up to the client's first read."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    said = ["", ""]
    for _ in range(4):
        for index, end in enumerate(ends):
            if said[index]:
                continue
            try:
                end.do_handshake()
                if index == 0:
                    end.read(1)
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                said[index] = sentence(error)
    return said[1], said[0]


def server(directory: Path, *names: str, refused: Callable[[str], None] | None = None) -> Context:
    return Context(str(directory), server_side=True, names=names, refused=refused)


def client(directory: Path, *names: str) -> Context:
    return Context(str(directory), server_side=False, names=names)


@pytest.mark.parametrize(
    "names", [("beta",), ("Beta",), ("2001:db8:0::2",), ("gamma", "2001:DB8::2"), ()],
    ids=["name", "capitals", "address", "one of two", "anybody of the CA"],
)  # fmt: skip
def test_peer_with_one_of_the_names_is_believed(made: Path, names: tuple[str, ...]) -> None:
    assert shake(server(made / "beta", "alpha"), client(made / "alpha", *names)) == ("", "")
    assert shake(server(made / "alpha", *names), client(made / "beta", "192.0.2.1")) == ("", "")


REFUSED = {
    # the peer's directory, what the one who looks at it says, what the peer hears
    "another name": ("alpha", "names alpha, 192.0.2.1, and not beta", ""),
    "no name": ("nameless", "names no host, and not beta", ""),
    "expired": ("expired", "its certificate has expired", "our certificate has expired"),
    "not valid yet": ("early", "is not valid yet", "it refuses our certificate"),
    "another CA": ("stranger", "not signed by our CA", "does not know the CA of our certificate"),
    "the wrong side": ("swapped", "not made for this side", "not made for this side"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_client_refuses_a_server(made: Path, row: str) -> None:
    directory, said, _ = REFUSED[row]
    _, heard = shake(server(made / directory), client(made / "alpha", "beta"))
    assert said in heard


@pytest.mark.parametrize("row", REFUSED)
def test_server_refuses_a_client_and_tells_why(made: Path, row: str) -> None:
    directory, said, heard = REFUSED[row]
    told: list[str] = []
    answer, theirs = shake(server(made / "beta", "beta", refused=told.append), client(made / directory))
    assert said in answer
    assert told == [answer]
    if heard:
        assert heard in theirs


def test_client_without_a_certificate_is_refused(made: Path) -> None:
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname = False
    bare.load_verify_locations(made / "alpha/ca-cert.pem")
    said, heard = shake(server(made / "beta"), bare)
    assert said == "it shows no certificate"
    assert heard == "it wants a certificate of ours and got none"


def test_tls_below_1_2_is_refused(made: Path) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname = False
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.load_verify_locations(made / "alpha/ca-cert.pem")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    said, heard = shake(server(made / "beta"), old)
    assert said == heard == "it speaks no TLS that we do (1.2 or newer)"


def broken(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "beta", tmp_path / "broken"))


WRONG = {
    "no CA": ("ca-cert.pem", None, "ca-cert.pem: No such file"),
    "no key": ("server-key.pem", None, "server-key.pem: No such file"),
    "a CA that is none": ("ca-cert.pem", b"hello", "ca-cert.pem: no certificate in PEM form"),
    "an empty CA": ("ca-cert.pem", b"", "ca-cert.pem: no certificate in PEM form"),
    "a certificate that is none": ("server-cert.pem", b"hello", "it or server-key.pem is not in PEM form"),
    "a key that is none": ("server-key.pem", b"hello", "it or server-key.pem is not in PEM form"),
}


@pytest.mark.parametrize("row", WRONG)
def test_wrong_file_is_named(made: Path, tmp_path: Path, row: str) -> None:
    name, content, said = WRONG[row]
    directory = broken(made, tmp_path)
    (directory / name).unlink()
    if content is not None:
        (directory / name).touch(mode=0o600)
        (directory / name).write_bytes(content)
    with pytest.raises(Error, match=said) as caught:
        server(directory)
    assert caught.value.kind is Kind.BAD_CONFIG


def test_key_of_another_certificate_is_named(made: Path, tmp_path: Path) -> None:
    directory = broken(made, tmp_path)
    shutil.copy(directory / "client-key.pem", directory / "server-key.pem")
    with pytest.raises(Error, match=r"server-cert.pem: it does not belong to server-key.pem"):
        server(directory)


def test_key_with_a_passphrase_is_refused_and_not_asked_for(made: Path, tmp_path: Path) -> None:
    directory = broken(made, tmp_path)
    key = directory / "server-key.pem"
    locked = directory / "locked"
    subprocess.run(
        ["openssl", "pkey", "-aes128", "-passout", "pass:x", "-in", key, "-out", locked], check=True
    )
    locked.rename(key)
    with pytest.raises(Error, match=r"server-key.pem: it has a passphrase"):
        server(directory)


@pytest.mark.parametrize(
    ("name", "mode", "said"),
    [
        ("server-key.pem", 0o644, "others may read it; expected "),
        ("server-cert.pem", 0o666, "others may write it; expected 0644 or less: `chmod go-w "),
        ("ca-cert.pem", 0o664, "its group may write it; expected 0644 or less: `chmod go-w "),
        (".", 0o777, "others may write it; expected 0755 or less: `chmod go-w "),
    ],
    ids=["key", "certificate", "CA", "directory"],
)
def test_files_that_others_could_change_or_keys_that_they_could_read_are_refused(
    made: Path, tmp_path: Path, name: str, mode: int, said: str
) -> None:
    """S5."""
    directory = broken(made, tmp_path)
    (directory / name).chmod(mode)
    with pytest.raises(Error) as caught:
        server(directory)
    assert caught.value.kind is Kind.BAD_CONFIG
    assert said in str(caught.value)


def test_key_that_others_may_read_is_not_taken_for_the_next_connection(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """S5: the files that were good are still used."""
    directory = broken(made, tmp_path)
    context, peer = server(directory), client(made / "alpha", "beta")
    for path in (made / "stranger").iterdir():
        shutil.copy(path, directory)
    (directory / "server-key.pem").chmod(0o644)
    assert shake(context, peer) == ("", "")
    assert "server-key.pem with mode 0644, so that others may read it" in caplog.text


def test_new_files_count_for_the_next_connection(made: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(made / "expired", tmp_path / "renewed"))
    context, peer = server(directory), client(made / "alpha", "beta")
    assert shake(context, peer)[1] == "its certificate has expired"
    for path in (made / "beta").iterdir():
        shutil.copy(path, directory)
    assert shake(context, peer) == ("", "")


def test_files_that_are_half_written_leave_the_old_ones_in_use(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = broken(made, tmp_path)
    context, peer = server(directory), client(made / "alpha", "beta")
    (directory / "server-cert.pem").write_text("-----BEGIN")
    assert shake(context, peer) == ("", "")
    assert "the files read before are still used" in caplog.text


def test_rehearsal_of_good_files(made: Path) -> None:
    rehearse(str(made / "beta"), ["beta", "192.0.2.2"])


def test_rehearsal_tells_until_when_each_certificate_is(made: Path, tmp_path: Path) -> None:
    directory = broken(made, tmp_path)
    Authority(tmp_path).issue(directory, "beta", valid=("20010101000000Z", "20420102030405Z"))
    ends = rehearse(str(directory), ["beta"])
    assert ends[directory / "server-cert.pem"] == ends[directory / "client-cert.pem"] == 2272244645
    assert set(ends) == {directory / name for name in ("server-cert.pem", "client-cert.pem", "ca-cert.pem")}


def test_rehearsal_looks_at_the_authority_that_has_signed_and_no_other(made: Path, tmp_path: Path) -> None:
    directory = broken(made, tmp_path)
    old = Authority(tmp_path, "old", days=1)
    with (directory / "ca-cert.pem").open("a") as file:
        file.write((old.directory / "ca-cert.pem").read_text())
    assert rehearse(str(directory), ["beta"])[directory / "ca-cert.pem"] > time.time() + 30 * 24 * 3600


@pytest.mark.parametrize("row", REFUSED)
def test_rehearsal_names_what_the_peer_will_refuse(made: Path, row: str) -> None:
    directory, said, _ = REFUSED[row]
    with pytest.raises(Error, match=r"server-cert.pem: the peer will refuse it") as caught:
        rehearse(str(made / directory), ["beta"])
    assert said in str(caught.value)


def test_rehearsal_looks_at_the_client_too(made: Path, tmp_path: Path) -> None:
    directory = broken(made, tmp_path)
    for name in ("client-cert.pem", "client-key.pem"):
        shutil.copy(made / "stranger" / name, directory)
    with pytest.raises(Error, match=r"client-cert.pem: .*not signed by our CA"):
        rehearse(str(directory), ["beta"])
