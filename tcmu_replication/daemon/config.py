"""The resource file: one replicated disk, described in TOML, the same file on both hosts.

    /etc/tcmu-replication/disk0.toml

    [resource]                                  [host.alpha]
    name = "disk0"                              mode = "primary"
    size = "256 MiB"                            address = "10.0.0.1"
                                                disk = "/dev/vg0/disk0"
    [link]                                      overlays = "/var/lib/tcmu-replication/disk0"
    port = 10809
                                                [host.beta]
                                                ...

What stands in a file is the tables below, one row per key; what they mean for
one host's disks is host_check.py. Every refusal is an `Error(BAD_CONFIG)` that
names the file, the key, what was found and what is expected. Reading changes
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta, Struct, field

from tcmu_replication import units
from tcmu_replication.daemon.config_values import AbsolutePath, Address, Listen, Name, Serial, Size
from tcmu_replication.errors import Error, Kind, one_line

SCSI_DEADLINE_S = 25.0
"""Before the kernel's 30 s a command is answered BUSY; whatever waits for the peer must end sooner."""
MAX_FILE_LENGTH = 64 << 10
"""A resource file is a page of text; more than this is another kind of file."""
MAX_DOTS = 64
"""In one line. tomllib needs memory by the square of a dotted key's parts: 100,000 of them take 40 GB."""

FAILOVER_MEANINGS = """\
latest      everything that the primary had acknowledged; this host's own writes since the last
            checkpoint are dropped. Right for an initiator that lives on and was told that its
            writes are safe.
checkpoint  the last checkpoint plus this host's own writes; what the primary wrote since is undone.
            Right where the consumer itself goes back to the checkpoint (a COLO or Remus VM)."""

Mode = Literal["primary", "secondary"]
FailoverTo = Literal["latest", "checkpoint"]


Port = Annotated[int, Meta(ge=1, le=65535, description="a TCP port, 1 to 65535")]
Seconds = Annotated[float, Meta(ge=0, le=SCSI_DEADLINE_S, description="seconds, 0 to 25")]
DeadAfter = Annotated[float, Meta(ge=2, le=600, description="seconds, 2 to 600")]
Timeout = Annotated[float, Meta(ge=0.1, le=SCSI_DEADLINE_S, description="seconds, 0.1 to 25")]


class _Resource(Struct, frozen=True, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """[resource]"""

    name: Name
    size: Size
    block_size: Literal[512, 4096] = 512
    failover: FailoverTo | None = None
    on_local_error: Literal["report", "detach"] = "report"
    after_crash: Literal["wait", "serve"] = "wait"
    resync: Literal["automatic", "manual"] = "automatic"
    serial: Serial | None = None
    durable: bool = True
    overlay_limit: Size | None = None


class Link(Struct, frozen=True, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """[link]: NBD `port`, `control_port`, and how long (seconds) a lost or silent peer is waited for.

    A primary that was not heard for `dead_after` seconds counts as gone when its secondary is promoted.

    With `socket`, a path, NBD is spoken there instead of on `port`: both ends are on one machine.
    `secret`, a path, is the file of a shared secret; `trust` says that the peer's address is enough (guards.py).
    """

    port: Port = 10809
    control_port: Port = 10810
    socket: AbsolutePath | None = None
    secret: AbsolutePath | None = None
    trust: Literal["address"] | None = None
    reconnect_delay: Seconds = 10.0
    timeout: Timeout = 10.0
    dead_after: DeadAfter = 3.0


class Host(Struct, frozen=True, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """[host.NAME]: what the resource is made of on one host."""

    mode: Mode
    address: Address
    disk: AbsolutePath
    overlays: AbsolutePath
    qemu: bool = False


class QemuHost(Struct, frozen=True, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """[host.NAME] with `qemu = true`: that end is QEMU's own replication.

    It has no control channel; with `qmp`, the path of its QMP socket here, a checkpoint is given there.
    """

    mode: Mode
    address: Address
    qemu: bool
    qmp: AbsolutePath | None = None


class Tls(Struct, frozen=True, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """[tls]: everything between the hosts is inside of TLS; `certificates` is a directory, as in docs/tls.md."""

    certificates: AbsolutePath


class Nbd(Struct, frozen=True, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """[nbd]: serve the LUN itself over NBD too; `open` says that over TCP everyone may come (guards.py)."""

    listen: Listen
    open: bool = False


class Resource(_Resource, frozen=True, kw_only=True):
    """A whole resource file; `path` is where it was read.

    name, size (bytes), block_size (bytes), failover, on_local_error, after_crash, resync
    (a primary that was down waits for the secondary's word, or serves), serial,
    durable (pre-images are on stable storage before the overwrite) and
    overlay_limit (bytes, None: no limit) come from [resource].
    """

    path: Path
    link: Link = field(default_factory=Link)
    hosts: dict[str, Host | QemuHost]
    nbd: Nbd | None = None
    tls: Tls | None = None

    def is_served_on(self, name: str) -> bool:
        """Whether it has a part on host `name` that is ours."""
        return isinstance(self.hosts.get(name), Host)

    def host(self, name: str) -> Host:
        """This resource's part on host `name`. Raises BAD_CONFIG if it has none there that is ours."""
        host = self.hosts.get(name)
        if isinstance(host, QemuHost):
            raise refusal(
                self.path, f"host.{name}.qemu", "true, so that it is QEMU that serves there", "false"
            )
        if host is None:
            raise refusal(
                self.path,
                "host",
                " and ".join(f"[host.{known}]" for known in sorted(self.hosts)),
                f"[host.{name}] for this host (or --host NAME if it has another name in the file)",
            )
        return host

    def peer(self, name: str) -> tuple[str, Host | QemuHost]:
        """The name and the part of the other host than `name`."""
        self.host(name)
        return next((other, host) for other, host in self.hosts.items() if other != name)

    def failover_to(self, asked: FailoverTo | None) -> FailoverTo:
        """What a failover means: what was asked for, or else the file's `failover`.

        Raises BAD_REQUEST with both meanings explained if neither says.
        """
        to = asked or self.failover
        if to is None:
            raise Error(
                Kind.BAD_REQUEST,
                f"{self.name}: a failover to what? Say --to latest or --to checkpoint, "
                f"or set `failover` in [resource] of {self.path}:\n{FAILOVER_MEANINGS}",
            )
        return to


def refusal(path: Path | str, key: str, found: str, expected: str) -> Error:
    """The one sentence of every wrong configuration."""
    return Error(Kind.BAD_CONFIG, f"{path}: {one_line(key)}: found {one_line(found)}; expected {expected}")


def find(name: str, where: Path) -> Resource:
    """The resource `name` of directory `where`."""
    if not Name.PATTERN.match(name):
        raise Error(Kind.BAD_REQUEST, f"{name!r} is not the name of a resource; expected {Name.expected}")
    return load(where / f"{name}.toml")


def load_all(where: Path) -> tuple[dict[str, Resource], dict[str, Error]]:
    """Every resource of a directory by name, and the error of each file that is wrong, by the file's stem."""
    resources, errors = {}, {}
    for path in sorted(where.glob("*.toml")):
        try:
            resources[path.stem] = load(path)
        except Error as error:
            errors[path.stem] = error
    return resources, errors


def load(path: Path) -> Resource:
    """Read and check one resource file. Raises BAD_CONFIG."""
    import tomllib

    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_LENGTH + 1)
    except OSError as error:
        raise refusal(path, "file", error.strerror or str(error), "a readable resource file") from error
    if len(data) > MAX_FILE_LENGTH:
        raise refusal(path, "file", f"more than {units.format_size(MAX_FILE_LENGTH)}", "a resource file")
    dots = max(line.count(b".") for line in data.split(b"\n"))
    if dots > MAX_DOTS:
        raise refusal(path, "file", f"a line with {dots} dots", f"at most {MAX_DOTS} in a line")
    try:
        document = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # both also for numbers too long, and nesting too deep
        raise refusal(path, "file", str(error), "TOML in UTF-8") from error
    return parse(document, path)


def parse(document: dict[str, Any], path: Path) -> Resource:
    """Check a document as tomllib returns it; `path` is for the messages and for the name."""
    _refuse_unknown(document, ("resource", "link", "host", "nbd", "tls"), "", path)
    if "resource" not in document:
        raise refusal(path, "[resource]", "nothing", "a table with at least name and size")
    resource = _table(_Resource, document["resource"], "resource", path)
    link = _table(Link, document.get("link", {}), "link", path)
    nbd = _table(Nbd, document["nbd"], "nbd", path) if "nbd" in document else None
    tls = _table(Tls, document["tls"], "tls", path) if "tls" in document else None
    hosts = _hosts(document.get("host"), path)
    _check_whole(resource, link, path)
    _check_guards(link, nbd, tls, hosts, path)
    return Resource(**msgspec.structs.asdict(resource), path=path, link=link, hosts=hosts, nbd=nbd, tls=tls)


def _hosts(found: Any, path: Path) -> dict[str, Host | QemuHost]:
    expected = "two tables [host.NAME], one with mode primary and one with mode secondary"
    if not isinstance(found, dict):
        raise refusal(path, "host", "nothing" if found is None else _show(found), expected)
    for name in found:
        if not Name.PATTERN.match(name):
            raise refusal(path, "host", f'a table named "{name}"', Name.expected)
    hosts = {name: _host(table, f"host.{name}", path) for name, table in found.items()}
    modes = sorted(host.mode for host in hosts.values())
    if modes != ["primary", "secondary"]:
        listed = ", ".join(f"{name} ({host.mode})" for name, host in hosts.items()) or "nothing"
        raise refusal(path, "host", listed, expected)
    first, second = hosts.items()
    if first[1].address == second[1].address:
        raise refusal(
            path, f"host.{second[0]}.address", f"{second[1].address}, which is {first[0]}'s", "one of its own"
        )
    if first[1].qemu and second[1].qemu:
        raise refusal(path, f"host.{second[0]}.qemu", "true on both hosts", "one host without QEMU")
    for name, host in hosts.items():
        if isinstance(host, QemuHost) and host.mode == "primary" and host.qmp is not None:
            expected = "nothing: it is for the secondary, which a primary of ours checkpoints"
            raise refusal(path, f"host.{name}.qmp", host.qmp, expected)
    return hosts


def _host(found: Any, where: str, path: Path) -> Host | QemuHost:
    qemu = isinstance(found, dict) and found.get("qemu") is True
    host: Host | QemuHost = _table(QemuHost if qemu else Host, found, where, path)
    return host


def _check_whole(resource: _Resource, link: Link, path: Path) -> None:
    """The rules that tie several keys together."""
    if resource.name != path.stem:
        raise refusal(path, "resource.name", repr(resource.name), f"{path.stem!r}, the name of the file")
    if resource.size % resource.block_size:
        raise refusal(
            path,
            "resource.size",
            f"{resource.size} bytes",
            f"a multiple of block-size ({resource.block_size})",
        )
    if link.port == link.control_port:
        raise refusal(path, "link.control-port", f"{link.port}, which is link.port", "a port of its own")
    if link.reconnect_delay + link.timeout >= SCSI_DEADLINE_S:
        raise refusal(
            path,
            "link.reconnect-delay",
            f"{link.reconnect_delay:g} s and link.timeout {link.timeout:g} s",
            f"together less than {SCSI_DEADLINE_S:g} s, so that every command is answered in time",
        )


def _check_guards(
    link: Link, nbd: Nbd | None, tls: Tls | None, hosts: dict[str, Host | QemuHost], path: Path
) -> None:
    """What is said of the guards must hold: it would be believed when one of them is taken away."""
    qemu = next((name for name, host in hosts.items() if host.qemu), None)
    if link.secret is not None and qemu is not None:
        expected = f"nothing: the QEMU on {qemu} cannot prove that it knows it; [tls] is what it speaks"
        raise refusal(path, "link.secret", link.secret, expected)
    if link.trust is not None and (link.secret is not None or tls is not None):
        guard = "[tls]" if link.secret is None else "link.secret"
        raise refusal(path, "link.trust", f'"{link.trust}" beside {guard}', "one of them")
    if nbd is not None and nbd.open and (nbd.listen.unix is not None or tls is not None):
        guard = "a unix socket" if nbd.listen.unix is not None else "[tls]"
        raise refusal(path, "nbd.open", f"true beside {guard}", "one of them")


def _table(kind: type[Struct], found: Any, where: str, path: Path) -> Any:
    """A struct of one table, checked key by key so that a message can say what is wrong with which."""
    if not isinstance(found, dict):
        raise refusal(path, where, _show(found), f"a table [{where}]")
    fields = msgspec.structs.fields(kind)
    _refuse_unknown(found, [row.encode_name for row in fields], where + ".", path)
    values = {}
    for row in fields:
        key = row.encode_name
        if key in found:
            values[row.name] = _value(row.type, found[key], f"{where}.{key}", path)
        elif row.required:
            raise refusal(path, f"{where}.{key}", "nothing", _expected(row.type))
    return kind(**values)


def _value(kind: Any, found: Any, key: str, path: Path) -> Any:
    try:
        value = msgspec.convert(found, kind, dec_hook=lambda cls, value: cls.parse(value))
    except (msgspec.ValidationError, ValueError) as error:
        raise refusal(path, key, _show(found), _expected(kind)) from error
    # What only checked itself is a plain value from here on: it is encoded again.
    if isinstance(value, Size):
        return int(value)
    return str(value) if isinstance(value, Name | Serial | Address | AbsolutePath) else value


def _expected(kind: Any) -> str:
    """What a key may hold, in words, from its type."""
    if hasattr(kind, "expected"):
        return str(kind.expected)
    if get_origin(kind) is Annotated:
        return str(kind.__metadata__[0].description)
    if get_origin(kind) is Literal:
        return " or ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in get_args(kind))
    if kind is bool:
        return "true or false"
    return " or ".join(_expected(part) for part in get_args(kind) if part is not type(None))


def _show(found: Any) -> str:
    """A value as the file spells it."""
    if isinstance(found, dict):
        return "a table"
    if isinstance(found, bool):
        return str(found).lower()
    try:
        return f'"{found}"' if isinstance(found, str) else str(found)
    except ValueError:  # CPython converts no more than 4300 digits
        return "a number of thousands of digits"


def _refuse_unknown(found: dict[str, Any], known: Sequence[str], prefix: str, path: Path) -> None:
    for key in found:
        if key in known:
            continue
        from difflib import get_close_matches

        near = get_close_matches(key, known, n=1)
        hint = f'"{near[0]}"' if near else "one of " + ", ".join(known)
        raise refusal(path, prefix + key, "an unknown key", hint)
