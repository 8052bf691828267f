"""Resource files: what is read, and the sentence for everything that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tcmu_replication import units
from tcmu_replication.daemon import config, config_values
from tcmu_replication.errors import Error, Kind

GOOD = """\
[resource]
name = "disk0"
size = "256 MiB"

[link]
port = 10809

[host.alpha]
mode = "primary"
address = "192.0.2.1"
disk = "/dev/vdb"
overlays = "/var/lib/overlays"

[host.beta]
mode = "secondary"
address = "192.0.2.2"
disk = "/dev/vdb"
overlays = "/var/lib/overlays"
"""


def write(directory: Path, text: str, name: str = "disk0.toml") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def test_least_file_has_the_documented_defaults(tmp_path: Path) -> None:
    resource = config.load(write(tmp_path, GOOD))
    assert (resource.name, resource.size, resource.block_size) == ("disk0", 256 * units.MiB, 512)
    assert (resource.failover, resource.on_local_error, resource.serial) == (None, "report", None)
    assert (resource.durable, resource.overlay_limit, resource.nbd) == (True, None, None)
    assert resource.link == config.Link(port=10809, control_port=10810, reconnect_delay=10.0, timeout=10.0)
    assert resource.host("alpha").mode == "primary"
    assert resource.peer("alpha") == ("beta", resource.hosts["beta"])


QEMU = GOOD.replace(
    'address = "192.0.2.2"\ndisk = "/dev/vdb"\noverlays = "/var/lib/overlays"\n',
    'address = "192.0.2.2"\nqemu = true\n',
)


def test_host_of_qemu_has_a_part_that_is_not_ours(tmp_path: Path) -> None:
    resource = config.load(write(tmp_path, QEMU + 'qmp = "/run/qmp"\n'))
    assert resource.peer("alpha") == (
        "beta",
        config.QemuHost(mode="secondary", address="192.0.2.2", qemu=True, qmp="/run/qmp"),
    )
    assert [resource.is_served_on(host) for host in ("alpha", "beta", "gamma")] == [True, False, False]
    with pytest.raises(Error, match="it is QEMU that serves there"):
        resource.host("beta")


def test_qmp_of_a_qemu_primary_is_refused(tmp_path: Path) -> None:
    text = QEMU.replace('"primary"', '"x"').replace('"secondary"', '"primary"').replace('"x"', '"secondary"')
    with pytest.raises(Error, match=r"host\.beta\.qmp: found /run/qmp; expected nothing"):
        config.load(write(tmp_path, text + 'qmp = "/run/qmp"\n'))


def test_both_hosts_of_qemu_are_refused(tmp_path: Path) -> None:
    text = QEMU.replace('disk = "/dev/vdb"\noverlays = "/var/lib/overlays"\n', "qemu = true\n")
    with pytest.raises(Error, match=r"host\.beta\.qemu: found true on both hosts"):
        config.load(write(tmp_path, text))


def test_link_over_a_unix_socket_and_tls(tmp_path: Path) -> None:
    text = GOOD.replace("port = 10809", 'socket = "/run/disk0.link"')
    resource = config.load(write(tmp_path, text + '[tls]\ncertificates = "/etc/pki/qemu"\n'))
    assert resource.link.socket == "/run/disk0.link"
    assert resource.tls == config.Tls(certificates="/etc/pki/qemu")


def test_full_file_is_read_whole(tmp_path: Path) -> None:
    text = GOOD.replace(
        'size = "256 MiB"',
        'size = 1048576\nblock-size = 4096\nfailover = "checkpoint"\non-local-error = "detach"\n'
        'serial = "ABC-1"\ndurable = false\noverlay-limit = "1 GiB"',
    ).replace("port = 10809", "port = 1\ncontrol-port = 2\nreconnect-delay = 3\ntimeout = 4.5")
    resource = config.load(write(tmp_path, text + '[nbd]\nlisten = "unix:/run/disk0.nbd"\n'))
    assert (resource.size, resource.block_size, resource.failover) == (units.MiB, 4096, "checkpoint")
    assert (resource.on_local_error, resource.serial, resource.durable) == ("detach", "ABC-1", False)
    assert resource.overlay_limit == units.GiB
    assert resource.link == config.Link(port=1, control_port=2, reconnect_delay=3.0, timeout=4.5)
    assert resource.nbd is not None
    assert resource.nbd.listen.unix == Path("/run/disk0.nbd")


@pytest.mark.parametrize(
    ("listen", "expected"), [("127.0.0.1:10809", ("127.0.0.1", 10809)), ("[::1]:80", ("::1", 80))]
)
def test_listen_over_tcp(listen: str, expected: tuple[str, int]) -> None:
    parsed = config_values.Listen.parse(listen)
    assert parsed.unix is None
    assert parsed.tcp == expected


WRONG = [
    # what is replaced, by what, the key that the message names, what was found, what is expected
    ("[resource]", "[resurce]", "resurce", "an unknown key", '"resource"'),
    ('name = "disk0"', 'nmae = "disk0"', "resource.nmae", "an unknown key", '"name"'),
    ("port = 10809", "frobnicate = 1", "link.frobnicate", "an unknown key", "one of port, control-port"),
    ('mode = "primary"', 'mode = "primary"\nx = 1', "host.alpha.x", "an unknown key", "one of mode"),
    ('name = "disk0"', "", "resource.name", "nothing", "1 to 64 letters"),
    ('name = "disk0"', 'name = "disk1"', "resource.name", "'disk1'", "'disk0', the name of the file"),
    ('name = "disk0"', 'name = "a,b"', "resource.name", '"a,b"', "1 to 64 letters"),
    ('name = "disk0"', 'name = "uio0"', "resource.name", '"uio0"', "not a device's"),
    ('name = "disk0"', "name = 7", "resource.name", "7", "1 to 64 letters"),
    ('size = "256 MiB"', "", "resource.size", "nothing", "a size"),
    ('size = "256 MiB"', 'size = "many"', "resource.size", '"many"', '"256 MiB"'),
    ('size = "256 MiB"', "size = true", "resource.size", "true", "a size"),
    ('size = "256 MiB"', "size = 1.5", "resource.size", "1.5", "a size"),
    ('size = "256 MiB"', "size = 0", "resource.size", "0", "a size"),
    ('size = "256 MiB"', "size = -512", "resource.size", "-512", "a size"),
    ('size = "256 MiB"', "size = 1000", "resource.size", "1000 bytes", "a multiple of block-size (512)"),
    ('size = "256 MiB"', 'size = "8M"\nblock-size = 1024', "resource.block-size", "1024", "512 or 4096"),
    ('size = "256 MiB"', 'size = "8M"\ndurable = 1', "resource.durable", "1", "true or false"),
    ('size = "256 MiB"', 'size = "8M"\nserial = "a b"', "resource.serial", '"a b"', "1 to 64 letters"),
    (
        'size = "256 MiB"',
        'size = "8M"\nfailover = "best"',
        "resource.failover",
        '"best"',
        '"latest" or "checkpoint"',
    ),
    (
        'size = "256 MiB"',
        'size = "8M"\non-local-error = "panic"',
        "resource.on-local-error",
        '"panic"',
        '"report" or "detach"',
    ),
    ("port = 10809", "port = 0", "link.port", "0", "a TCP port"),
    ("port = 10809", "port = 65536", "link.port", "65536", "a TCP port"),
    ("port = 10809", 'port = "10809"', "link.port", '"10809"', "a TCP port"),
    ("port = 10809", "port = 1.5", "link.port", "1.5", "a TCP port"),
    ("port = 10809", "port = 10810", "link.control-port", "10810, which is link.port", "a port of its own"),
    ("port = 10809", "timeout = 0", "link.timeout", "0", "seconds, 0.1 to 25"),
    ("port = 10809", "timeout = nan", "link.timeout", "nan", "seconds, 0.1 to 25"),
    ("port = 10809", "reconnect-delay = -1", "link.reconnect-delay", "-1", "seconds, 0 to 25"),
    (
        "port = 10809",
        "reconnect-delay = 20\ntimeout = 5",
        "link.reconnect-delay",
        "20 s and link.timeout 5 s",
        "together less than 25 s",
    ),
    ('mode = "primary"', 'mode = "master"', "host.alpha.mode", '"master"', '"primary" or "secondary"'),
    ('mode = "primary"', 'mode = "secondary"', "host", "alpha (secondary), beta (secondary)", "two tables"),
    ('mode = "secondary"', 'mode = "primary"', "host", "alpha (primary), beta (primary)", "two tables"),
    ('address = "192.0.2.1"', 'address = "alpha"', "host.alpha.address", '"alpha"', "an IPv4 or IPv6"),
    (
        'address = "192.0.2.1"',
        'address = "192.0.2.2"',
        "host.beta.address",
        "192.0.2.2, which is alpha's",
        "one of its own",
    ),
    ('disk = "/dev/vdb"', 'disk = "vdb"', "host.alpha.disk", '"vdb"', "an absolute path"),
    ("[host.beta]", "[host.gamma.beta]", "host.gamma.beta", "an unknown key", "one of mode"),
    ("[link]", "[nbd]\nlisten = 'unix:x'\n[link]", "nbd.listen", '"unix:x"', '"unix:/path'),
    ("[link]", "[nbd]\nlisten = '127.0.0.1'\n[link]", "nbd.listen", '"127.0.0.1"', '"unix:/path'),
    ("[link]", "[nbd]\nlisten = '127.0.0.1:99999'\n[link]", "nbd.listen", ":99999", '"unix:/path'),
    ("[link]", "[nbd]\nlisten = '::1:80'\n[link]", "nbd.listen", '"::1:80"', '"unix:/path'),
    ("[link]", "[nbd]\n[link]", "nbd.listen", "nothing", '"unix:/path'),
    ("[link]", "[tls]\n[link]", "tls.certificates", "nothing", "an absolute path"),
    ("[link]", "[tls]\ncertificates = 'tls'\n[link]", "tls.certificates", '"tls"', "an absolute path"),
    ("port = 10809", "socket = 'link'", "link.socket", '"link"', "an absolute path"),
    ('mode = "primary"', 'mode = "primary"\nqemu = 1', "host.alpha.qemu", "1", "true or false"),
    ('mode = "primary"', 'mode = "primary"\nqemu = true', "host.alpha.disk", "an unknown key", "qmp"),
    ("[link]", "[[link]]", "link", "[{'port': 10809}]", "a table [link]"),
    ('size = "256 MiB"', "size = 0x" + "f" * 5000, "resource.size", "thousands of digits", "a size"),
    ('size = "256 MiB"', 'size = "' + "1" * 5000 + '"', "resource.size", '"1111', "a size"),
    ("port = 10809", '"po\\nrt" = 1', "link.po?rt", "an unknown key", '"port"'),
    ("port = 10809", "x" * 5000 + " = 1", "link." + "x" * 392 + "...", "an unknown key", "one of port"),
    ('mode = "primary"', 'mode = "\\u001b[31m"', "host.alpha.mode", '"?[31m"', '"primary"'),
    ('"/dev/vdb"', '"/dev/v\\nb"', "host.alpha.disk", '"/dev/v?b"', "an absolute path"),
    ('"192.0.2.1"', '"fe80::1%\\n"', "host.alpha.address", '"fe80::1%?"', "an IPv4 or IPv6"),
    ("[host.alpha]", '[host."al pha"]', "host", 'named "al pha"', "1 to 64 letters"),
]


@pytest.mark.parametrize(
    ("old", "new", "key", "found", "expected"), WRONG, ids=[f"{row[2]}-{row[3]}"[:60] for row in WRONG]
)
def test_wrong_file_is_refused_naming_file_key_found_and_expected(
    tmp_path: Path, old: str, new: str, key: str, found: str, expected: str
) -> None:
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(Error) as caught:
        config.load(path)
    assert caught.value.kind is Kind.BAD_CONFIG
    where, _, rest = str(caught.value).partition(": ")
    named, _, said = rest.partition(": found ")
    told, _, wanted = said.rpartition("; expected ")
    assert (where, named) == (str(path), key)
    assert found in told
    assert expected in wanted


def test_host_table_missing_altogether(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD[: GOOD.index("[host.alpha]")])
    with pytest.raises(Error, match=r"disk0\.toml: host: found nothing; expected two tables"):
        config.load(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[resource]\nname = 1 2", "line 2"),
        (b"\xff\xfe", "utf-8"),
        (b"#" * (config.MAX_FILE_LENGTH + 1), "more than 64 KiB"),
        (b"a." * 20_000 + b"a = 1", "a line with 20000 dots"),
        (b"a = " + b"[" * 20_000, "recursion"),
        (b"a = " + b"1" * 5000, "5000 digits"),
        (b"", "nothing"),
    ],
    ids=["not-toml", "not-utf-8", "too-long", "dots", "deep", "digits", "empty"],
)
def test_file_that_is_no_resource_file(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "disk0.toml"
    path.write_bytes(content)
    with pytest.raises(Error) as caught:
        config.load(path)
    assert caught.value.kind is Kind.BAD_CONFIG
    assert said in str(caught.value)


def test_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"disk0\.toml: file: found No such file"):
        config.find("disk0", tmp_path)


def test_find_refuses_a_name_that_leaves_the_directory(tmp_path: Path) -> None:
    with pytest.raises(Error, match="not the name of a resource"):
        config.find("../disk0", tmp_path)


def test_load_all_keeps_the_good_beside_the_bad(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    write(tmp_path, "[resource]", "broken.toml")
    resources, errors = config.load_all(tmp_path)
    assert list(resources) == ["disk0"]
    assert list(errors) == ["broken"]


def test_host_not_in_the_file(tmp_path: Path) -> None:
    resource = config.load(write(tmp_path, GOOD))
    with pytest.raises(Error, match=r"found \[host\.alpha\] and \[host\.beta\]; expected \[host\.gamma\]"):
        resource.host("gamma")


def test_failover_meaning_is_asked_for_once_somewhere(tmp_path: Path) -> None:
    silent = config.load(write(tmp_path, GOOD))
    assert silent.failover_to("latest") == "latest"
    with pytest.raises(Error) as caught:
        silent.failover_to(None)
    assert caught.value.kind is Kind.BAD_REQUEST
    assert "acknowledged" in str(caught.value)
    assert "last checkpoint plus" in str(caught.value)
    decided = config.load(write(tmp_path, GOOD.replace("[link]", 'failover = "checkpoint"\n[link]')))
    assert decided.failover_to(None) == "checkpoint"
    assert decided.failover_to("latest") == "latest"
