"""What guards the ports of a resource, in words and in what is refused; and the file of the link's shared secret.

[tls]                       both hosts show certificates; encrypted
link.secret                 both ends prove that they know it; not encrypted
link.trust = "address"      nothing but the address: said in the file, or the resource is not served
nbd.open = true             the same for the LUN itself, where it is offered over TCP without [tls]
"""

from __future__ import annotations

import os
import shlex
import stat

from tcmu_replication import ownership
from tcmu_replication.daemon.config import Resource, refusal
from tcmu_replication.errors import Error
from tcmu_replication.secret import Port, Secret

SHORTEST, LONGEST = 16, 4096
"""Bytes of a secret, without the newline at its end."""


def check_guards(resource: Resource) -> None:
    """Raise BAD_CONFIG for a link or a LUN that nothing guards where the file does not say so, or a secret's
    file that is no good.
    """
    if resource.link.secret is not None:
        read_secret(resource)
    elif _is_bare(resource) and resource.link.trust is None:
        wanted = f"/etc/tcmu-replication/{resource.name}.secret"
        raise refusal(
            resource.path,
            "link.secret",
            f"nothing, and no [tls]: {_exposed(resource)}",
            f'`secret = "{wanted}"`, the same file on both hosts ({_recipe(wanted)}); or [tls]; '
            'or `trust = "address"` to leave it so',
        )
    nbd = resource.nbd
    if nbd is not None and nbd.listen.unix is None and resource.tls is None and not nbd.open:
        raise refusal(
            resource.path,
            "nbd.listen",
            f"{nbd.listen} without [tls]: everyone who reaches it may read and write the LUN",
            '"unix:/path/of/a/socket", or [tls], or `open = true` in [nbd] to leave it so',
        )


def warnings(resource: Resource) -> list[str]:
    """A sentence for each port that nothing guards."""
    said = []
    if _is_bare(resource):
        said.append(f"the link is bare: {_exposed(resource)}")
    if resource.nbd is not None and resource.nbd.open and resource.tls is None:
        said.append(f"[nbd] is open: everyone who reaches {resource.nbd.listen} may read and write the LUN")
    return said


def link_guard(resource: Resource) -> str:
    """How what the hosts send each other is guarded."""
    link = resource.link
    parts = []
    if resource.tls is not None:
        parts.append("TLS, both hosts show certificates")
    if link.secret is not None:
        parts.append("secret" if parts else "secret, not encrypted")
    if not parts:
        parts.append("a unix socket, for root" if not _is_bare(resource) else f"bare: {_exposed(resource)}")
    return "; ".join(parts)


def nbd_guard(resource: Resource) -> str | None:
    """How the LUN itself is guarded where [nbd] offers it."""
    if resource.nbd is None:
        return None
    listen = resource.nbd.listen
    if listen.unix is not None:
        return f"{listen}, for root"
    return f"{listen}, " + ("TLS" if resource.tls is not None else "open to everyone who reaches it")


def secret(resource: Resource, port: Port) -> Secret | None:
    """What both ends prove on a port; the file is read anew for each connection."""
    if resource.link.secret is None:
        return None
    return Secret(lambda: read_secret(resource), resource.name, port)


def read_secret(resource: Resource) -> bytes:
    """The content of the secret's file, which only root, or the worker's user, may read. Raises BAD_CONFIG."""
    path = resource.link.secret
    assert path is not None
    try:
        if (fault := ownership.fault(path, ownership.SECRET, ownership.users())) is not None:
            raise _refusal(resource, fault)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise refusal(resource.path, "link.secret", f"{path}, which is no file", _recipe(path))
            # What was opened is what counts, if somebody has changed it meanwhile.
            row = path, found.st_mode, found.st_uid, ownership.SECRET, ownership.users()
            if (fault := ownership.judge(*row)) is not None:
                raise _refusal(resource, fault)
            content = file.read(LONGEST + 2).removesuffix(b"\n")
    except OSError as error:
        reason = "a link" if os.path.islink(path) else error.strerror
        raise refusal(resource.path, "link.secret", f"{path} ({reason})", _recipe(path)) from error
    if not SHORTEST <= len(content) <= LONGEST:
        count = f"more than {LONGEST}" if len(content) > LONGEST else len(content)
        raise refusal(
            resource.path,
            "link.secret",
            f"{path} of {count} bytes",
            f"{SHORTEST} to {LONGEST} bytes: {_recipe(path)}",
        )
    return content


def _refusal(resource: Resource, fault: ownership.Fault) -> Error:
    return refusal(resource.path, "link.secret", fault.found, fault.expected)


def _recipe(path: str) -> str:
    """How a secret is made, in a command."""
    return f"`(umask 077 && head -c 32 /dev/urandom | base64 >{shlex.quote(path)})`, then copied to the other host"


def _is_bare(resource: Resource) -> bool:
    """Whether nothing guards the link. (The socket of a QEMU on this machine is guarded by its file's mode.)"""
    qemu = any(host.qemu for host in resource.hosts.values())
    return (
        resource.tls is None
        and resource.link.secret is None
        and not (qemu and resource.link.socket is not None)
    )


def _exposed(resource: Resource) -> str:
    """Who may do what to a link without a guard."""
    (_, primary), (name, secondary) = sorted(resource.hosts.items(), key=lambda row: row[1].mode)
    if secondary.qemu:
        return f"whom the QEMU at {secondary.address} lets in may write the disk of {name}"
    return f"anyone at {primary.address} may write the disk of {name}"
