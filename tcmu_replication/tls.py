"""TLS between the hosts: mutual, with x509 certificates in the files that QEMU, nbdkit and libnbd use too.

    DIRECTORY/ca-cert.pem                       who signs for both hosts
    DIRECTORY/server-cert.pem, server-key.pem   what this host shows where it listens
    DIRECTORY/client-cert.pem, client-key.pem   what it shows where it connects

A handshake succeeds only with a peer whose certificate the CA has signed and
that names the peer's host. The files are read again when they have changed, so
new certificates need no restart; only a CA that is taken out of ca-cert.pem is
trusted until the process ends.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import ssl
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from tcmu_replication import ownership
from tcmu_replication.errors import Error, Kind

log = logging.getLogger(__name__)

CA = "ca-cert.pem"


class _Verified(ssl.SSLObject):
    """One connection, whose handshake also looks at the peer's names."""

    def do_handshake(self) -> None:
        context = self.context
        assert isinstance(context, Context)
        try:
            super().do_handshake()
            context.check_names(self.getpeercert() or {})
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            if context.refused is not None:
                context.refused(sentence(error))
            raise


class Context(ssl.SSLContext):
    """How this host shows itself and whom it believes: TLS 1.2 or newer, no tickets.

    `names` are those of which the peer's certificate must have one in its
    subjectAltName: host names and addresses; without any, every certificate of
    the CA will do. `refused(sentence)` hears of each peer that is not let in.
    Raises Error BAD_CONFIG that names the file, also if others could change it,
    or read the key.
    """

    sslobject_class = _Verified

    def __new__(cls, directory: str, *, server_side: bool, **_: Any) -> Context:
        return super().__new__(cls, ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)

    def __init__(
        self,
        directory: str,
        *,
        server_side: bool,
        names: Collection[str] = (),
        refused: Callable[[str], None] | None = None,
    ) -> None:
        self.refused = refused
        self.names = frozenset(map(_plain, names))
        self.check_hostname = False  # it knows one name; check_names knows all
        self.verify_mode = ssl.CERT_REQUIRED
        self.minimum_version = ssl.TLSVersion.TLSv1_2
        # What was once verified is verified each time, and never changes in between.
        self.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
        if server_side:
            self.num_tickets = 0
        role = "server" if server_side else "client"
        self._files = [Path(directory) / name for name in (CA, f"{role}-cert.pem", f"{role}-key.pem")]
        self._read_state: list[tuple[int, ...]] = []
        self._read()

    def wrap_bio(self, *arguments: Any, **options: Any) -> ssl.SSLObject:
        """A new connection, with the files as they are now; with the old ones if they are no good."""
        try:
            if self._state() != self._read_state:
                self._read()
        except Error as error:
            log.warning("TLS: the files read before are still used: %s", error)
        return super().wrap_bio(*arguments, **options)

    def check_names(self, certificate: dict[str, Any]) -> None:
        """Raise SSLCertVerificationError unless the certificate names the peer."""
        found = [_plain(value) for kind, value in certificate.get("subjectAltName", ()) if kind in _KINDS]
        if self.names and not self.names.intersection(found):
            raise ssl.SSLCertVerificationError(
                1,
                f"its certificate names {', '.join(found) or 'no host'}, "
                f"and not {' or '.join(sorted(self.names))} (subjectAltName)",
            )

    def _state(self) -> list[tuple[int, ...]]:
        """What changes when a file does. Raises BAD_CONFIG if one cannot be looked at."""
        state: list[tuple[int, ...]] = []
        for path in self._files:
            try:
                found = os.stat(path)
            except OSError as error:
                raise _refusal(path, error.strerror or str(error)) from error
            state.append((found.st_ino, found.st_size, found.st_mtime_ns))
        return state

    def _read(self) -> None:
        state = self._state()
        authority, certificate, key = self._files
        for path in self._files:
            try:
                with open(path, "rb") as file:
                    file.read(1)
            except OSError as error:
                raise _refusal(path, error.strerror or str(error)) from error
            ownership.check(path, ownership.SECRET if path is key else ownership.FILE)
        try:
            self.load_verify_locations(authority)
        except (ssl.SSLError, ValueError) as error:
            raise _refusal(authority, "no certificate in PEM form") from error
        try:
            self.load_cert_chain(certificate, key, password=_no_password)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise _refusal(certificate, f"it does not belong to {key.name}") from error
            raise _refusal(certificate, f"it or {key.name} is not in PEM form") from error
        except ValueError as error:
            raise _refusal(key, str(error)) from error
        self._read_state = state


_KINDS = ("DNS", "IP Address")


def _no_password() -> str:
    """What OpenSSL asks for if a key has a passphrase."""
    raise ValueError("it has a passphrase, which nobody is there to type")


def _refusal(path: Path, found: str) -> Error:
    return Error(Kind.BAD_CONFIG, f"{path}: {found}; docs/tls.md tells what belongs there")


def _plain(name: str) -> str:
    """A name as it is compared: addresses in their shortest form, the rest in small letters."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name.lower().rstrip(".")


_VERIFY = {
    9: "its certificate is not valid yet",
    10: "its certificate has expired",
    18: "its certificate is signed by itself, not by our CA",
    19: "its certificate is not signed by our CA",
    20: "its certificate is not signed by our CA",
    21: "its certificate is not signed by our CA",
    26: "its certificate is not made for this side of a connection (extendedKeyUsage)",
}
"""By X509_V_ERR_* of OpenSSL."""

_REASONS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it shows no certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it wants a certificate of ours and got none",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not know the CA of our certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "our certificate has expired",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it refuses our certificate",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it refuses our certificate",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "our certificate is not made for this side of a connection",
    "TLSV1_ALERT_ACCESS_DENIED": "it refuses our certificate",
    "WRONG_VERSION_NUMBER": "it does not speak TLS here",
    "HTTP_REQUEST": "it does not speak TLS here",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it speaks no TLS that we do (1.2 or newer)",
    "UNSUPPORTED_PROTOCOL": "it speaks no TLS that we do (1.2 or newer)",
}
"""By the reason of OpenSSL's error; SSLV3 and TLSV1 there say when the alert was invented."""


def sentence(error: ssl.SSLError) -> str:
    """What went wrong with TLS; the peer is "it"."""
    if isinstance(error, ssl.SSLCertVerificationError):
        code = getattr(error, "verify_code", None)
        if code is None:
            return str(error)
        return _VERIFY.get(code, f"its certificate is not accepted: {error.verify_message}")
    if isinstance(error, ssl.SSLEOFError):
        return "it hung up in the TLS handshake"
    return _REASONS.get(error.reason or "", f"TLS failed: {error.reason or error}")


def rehearse(directory: str, names: Collection[str]) -> dict[Path, float]:
    """Let this host's server and client shake hands in memory: all that the peer will look at is good.

    `names` are this host's. Returns until when each certificate is, in seconds
    since 1970. Raises Error BAD_CONFIG that names the file.
    """
    server = Context(directory, server_side=True, names=names)
    client = Context(directory, server_side=False, names=names)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        (client.wrap_bio(to_client, to_server), "server-cert.pem"),
        (server.wrap_bio(to_server, to_client, server_side=True), "client-cert.pem"),
    ]
    for _ in range(3):  # more rounds than any handshake takes
        for side, name in sides:
            try:
                with contextlib.suppress(ssl.SSLWantReadError):
                    side.do_handshake()
            except ssl.SSLError as error:
                path = Path(directory) / name
                raise Error(Kind.BAD_CONFIG, f"{path}: the peer will refuse it: {sentence(error)}") from error
    shown = {Path(directory) / name: side.getpeercert() or {} for side, name in sides}
    # One that is about to go may lie beside the one that follows it.
    authorities = server.get_ca_certs()
    signed = [
        max(_end(ca) for ca in authorities if ca["subject"] == certificate["issuer"])
        for certificate in shown.values()
        if any(ca["subject"] == certificate["issuer"] for ca in authorities)
    ]
    ends = {path: _end(certificate) for path, certificate in shown.items()}
    return ends | ({Path(directory) / CA: min(signed)} if signed else {})


def _end(certificate: Mapping[str, Any]) -> float:
    """Until when a certificate is, in seconds since 1970."""
    return ssl.cert_time_to_seconds(certificate["notAfter"])
