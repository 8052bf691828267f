"""What guards the ports of a resource (S1, S3): refused where nothing does and the file does not say so."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tcmu_replication.daemon import config, guards
from tcmu_replication.errors import Error, Kind

CONTENT = b"0123456789abcdef"
NOWHERE = {"disk": "/nowhere", "overlays": "/nowhere"}


def parse(
    path: Path, link: dict[str, Any], beta: dict[str, Any] | None = None, **tables: Any
) -> config.Resource:
    """A resource whose hosts are alpha (primary) and beta."""
    hosts = {
        "alpha": {"mode": "primary", "address": "192.0.2.1", **NOWHERE},
        "beta": {"mode": "secondary", "address": "192.0.2.2", **(beta or NOWHERE)},
    }
    document = {"resource": {"name": "disk0", "size": 1 << 20}, "link": link, "host": hosts, **tables}
    return config.parse(document, path / "disk0.toml")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "disk0.secret"
    path.touch(mode=0o600)
    path.write_bytes(CONTENT + b"\n")
    return path


def refused(resource: config.Resource) -> str:
    with pytest.raises(Error) as caught:
        guards.check_guards(resource)
    assert caught.value.kind is Kind.BAD_CONFIG
    return str(caught.value)


QEMU = {"qemu": True}
TLS = {"certificates": "/etc/tls"}
SOCKET = {"socket": "/run/link"}

GUARDED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "tls": ({}, {"tls": TLS}, "TLS, both hosts show certificates"),
    "a QEMU's socket": (SOCKET, {"beta": QEMU}, "a unix socket, for root"),
}


@pytest.mark.parametrize("row", GUARDED)
def test_link_that_is_guarded_passes_without_a_word(tmp_path: Path, row: str) -> None:
    link, tables, said = GUARDED[row]
    resource = parse(tmp_path, link, **tables)
    guards.check_guards(resource)
    assert guards.warnings(resource) == []
    assert guards.link_guard(resource) == said


def test_link_with_a_secret_passes_without_a_word(tmp_path: Path, file: Path) -> None:
    resource = parse(tmp_path, {"secret": str(file)})
    guards.check_guards(resource)
    assert guards.warnings(resource) == []
    assert guards.link_guard(resource) == "secret, not encrypted"
    assert guards.link_guard(parse(tmp_path, {"secret": str(file)}, tls=TLS)).endswith("certificates; secret")


BARE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "over TCP": ({}, {}, "anyone at 192.0.2.1 may write the disk of beta"),
    "on loopback too": (SOCKET, {}, "anyone at 192.0.2.1 may write the disk of beta"),
    "to a QEMU": ({}, {"beta": QEMU}, "whom the QEMU at 192.0.2.2 lets in may write the disk of beta"),
}


@pytest.mark.parametrize("row", BARE)
def test_bare_link_is_refused_unless_the_file_says_so(tmp_path: Path, row: str) -> None:
    link, tables, said = BARE[row]
    text = refused(parse(tmp_path, link, **tables))
    assert f"link.secret: found nothing, and no [tls]: {said}; expected `secret = " in text
    assert "(umask 077 && head -c 32 /dev/urandom | base64 >" in text
    assert 'or `trust = "address"`' in text
    resource = parse(tmp_path, link | {"trust": "address"}, **tables)
    guards.check_guards(resource)
    assert guards.warnings(resource) == [f"the link is bare: {said}"]
    assert guards.link_guard(resource) == f"bare: {said}"


def test_lun_over_tcp_without_tls_is_refused_unless_the_file_says_so(tmp_path: Path) -> None:
    """S3."""
    link = {"trust": "address"}
    text = refused(parse(tmp_path, link, nbd={"listen": "0.0.0.0:10811"}))
    assert "nbd.listen: found 0.0.0.0:10811 without [tls]: everyone who reaches it may read and write" in text
    assert "expected " in text
    assert "`open = true`" in text
    resource = parse(tmp_path, link, nbd={"listen": "0.0.0.0:10811", "open": True})
    guards.check_guards(resource)
    assert guards.nbd_guard(resource) == "0.0.0.0:10811, open to everyone who reaches it"
    assert guards.warnings(resource)[1:] == [
        "[nbd] is open: everyone who reaches 0.0.0.0:10811 may read and write the LUN"
    ]
    for guarded in (
        {"nbd": {"listen": "0.0.0.0:10811"}, "tls": TLS},
        {"nbd": {"listen": "unix:/run/x"}, "tls": TLS},
    ):
        resource = parse(tmp_path, {}, **guarded)
        guards.check_guards(resource)
        assert guards.warnings(resource) == []
        assert guards.nbd_guard(resource) in ("0.0.0.0:10811, TLS", "unix:/run/x, for root")
    assert guards.nbd_guard(parse(tmp_path, link)) is None


CONTRADICTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "secret with a QEMU": (
        {"secret": "/s"},
        {"beta": QEMU},
        "link.secret: found /s; expected nothing: the QEMU on beta",
    ),
    "trust with a secret": ({"secret": "/s", "trust": "address"}, {}, 'found "address" beside link.secret'),
    "trust with tls": ({"trust": "address"}, {"tls": TLS}, 'link.trust: found "address" beside [tls]'),
    "another trust": ({"trust": "everybody"}, {}, 'link.trust: found "everybody"; expected "address"'),
    "secret that is no path": ({"secret": "abc"}, {}, 'link.secret: found "abc"; expected an absolute path'),
    "open with a unix socket": (
        {},
        {"nbd": {"listen": "unix:/run/x", "open": True}},
        "nbd.open: found true beside a unix",
    ),
    "open with tls": (
        {},
        {"nbd": {"listen": "192.0.2.1:9", "open": True}, "tls": TLS},
        "nbd.open: found true beside [tls]",
    ),
}


@pytest.mark.parametrize("row", CONTRADICTIONS)
def test_file_that_contradicts_itself_is_refused(tmp_path: Path, row: str) -> None:
    link, tables, said = CONTRADICTIONS[row]
    with pytest.raises(Error) as caught:
        parse(tmp_path, link, **tables)
    assert caught.value.kind is Kind.BAD_CONFIG
    assert said in str(caught.value)


# The file of the secret


def test_secret_is_the_content_without_one_newline_and_read_anew(tmp_path: Path, file: Path) -> None:
    resource = parse(tmp_path, {"secret": str(file)})
    assert guards.read_secret(resource) == CONTENT
    file.write_bytes(CONTENT + b"\n\n")
    assert guards.read_secret(resource) == CONTENT + b"\n"
    made = guards.secret(resource, "nbd")
    assert made is not None
    file.write_bytes(b"another of sixteen")
    assert made.read() == b"another of sixteen"
    assert guards.secret(parse(tmp_path, {"trust": "address"}), "nbd") is None


@pytest.mark.parametrize("length", [16, 4096])
def test_secret_of_the_least_and_the_greatest_length(tmp_path: Path, file: Path, length: int) -> None:
    file.write_bytes(b"x" * length + b"\n")
    assert len(guards.read_secret(parse(tmp_path, {"secret": str(file)}))) == length


@pytest.mark.parametrize(
    ("content", "count"),
    [(b"", "0"), (b"x" * 15 + b"\n", "15"), (b"x" * 4097, "more than 4096"), (b"x" * 9999, "more than 4096")],
)
def test_secret_of_another_length_is_refused(tmp_path: Path, file: Path, content: bytes, count: str) -> None:
    file.write_bytes(content)
    text = refused(parse(tmp_path, {"secret": str(file)}))
    assert f"link.secret: found {file} of {count} bytes; expected 16 to 4096 bytes: `(umask 077" in text


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o601, 0o620, 0o666])
def test_secret_that_others_may_use_is_refused(tmp_path: Path, file: Path, mode: int) -> None:
    file.chmod(mode)
    text = refused(parse(tmp_path, {"secret": str(file)}))
    assert f"link.secret: found {file} with mode {mode:04o}" in text
    assert f"chmod go= {file}" in text or "chmod g-wx,o=" in text


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_secret_of_somebody_else_is_refused(tmp_path: Path, file: Path) -> None:
    os.chown(file, 65534, -1)
    assert "which belongs to " in refused(parse(tmp_path, {"secret": str(file)}))


def test_secret_that_is_a_link_a_directory_or_a_pipe_is_refused(tmp_path: Path, file: Path) -> None:
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(file)
    os.mkfifo(pipe, 0o600)
    (tmp_path / "directory").mkdir(mode=0o700)
    for name, said in (
        ("link", "(a link)"),
        ("pipe", "which is no file"),
        ("directory", "directory"),
        ("none", "No such"),
    ):
        text = refused(parse(tmp_path, {"secret": str(tmp_path / name)}))
        assert f"link.secret: found {tmp_path / name}" in text
        assert said in text
        assert "head -c 32 /dev/urandom" in text
