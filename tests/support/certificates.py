"""Certificates for tests, made with the openssl program: a CA, and directories as docs/tls.md describes them.

authority = Authority(path)
authority.issue(path / "alpha", "alpha", "127.0.0.1")     all five files of one host
"""

from __future__ import annotations

import ipaddress
import shutil
import subprocess
from pathlib import Path

USAGE = {"server": "serverAuth", "client": "clientAuth"}

PAST = ("20010101000000Z", "20010102000000Z")
"""Start and end of a certificate that has expired."""
FUTURE = ("20990101000000Z", "20990102000000Z")
"""And of one that is not valid yet."""

_CONFIG = """\
[ca]
default_ca = here
[here]
new_certs_dir = .
database = index.txt
serial = serial
default_md = sha256
default_days = 90
policy = any
unique_subject = no
[any]
commonName = supplied
"""


class Authority:
    """A CA in its own directory below `base`."""

    def __init__(self, base: Path, name: str = "ca", days: int = 90) -> None:
        self.directory = base / name
        self.directory.mkdir(parents=True)
        (self.directory / "ca.conf").write_text(_CONFIG)
        (self.directory / "index.txt").touch()
        (self.directory / "serial").write_text("01\n")
        self._openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", str(days),
            "-subj", f"/CN={name}", "-keyout", "ca-key.pem", "-out", "ca-cert.pem",
            "-addext", "keyUsage=critical,keyCertSign,cRLSign",
        )  # fmt: skip

    def issue(self, directory: Path, *names: str, valid: tuple[str, str] | None = None) -> Path:
        """All files of a host with these names and addresses in `directory`, made if it is missing."""
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.directory / "ca-cert.pem", directory)
        for role in USAGE:
            self.issue_one(directory, role, *names, valid=valid)
        return directory

    def issue_one(
        self, directory: Path, role: str, *names: str, valid: tuple[str, str] | None = None, usage: str = ""
    ) -> None:
        """`role`-cert.pem and `role`-key.pem, in place of what was there."""
        extensions = directory / "extensions.conf"
        alternatives = ",".join(f"{'IP' if _is_address(name) else 'DNS'}:{name}" for name in names)
        extensions.write_text(
            "basicConstraints=critical,CA:false\nkeyUsage=critical,digitalSignature,keyEncipherment\n"
            f"extendedKeyUsage={usage or USAGE[role]}\n"
            + (f"subjectAltName={alternatives}\n" if alternatives else "")
        )
        request = directory / "request.pem"
        key, certificate = directory / f"{role}-key.pem", directory / f"{role}-cert.pem"
        self._openssl(
            "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-subj", "/CN=test", "-keyout", str(key), "-out", str(request),
        )  # fmt: skip
        dates = [] if valid is None else ["-startdate", valid[0], "-enddate", valid[1]]
        self._openssl(
            "ca", "-batch", "-notext", "-config", "ca.conf", "-cert", "ca-cert.pem", "-keyfile", "ca-key.pem",
            "-in", str(request), "-out", str(certificate), "-extfile", str(extensions), *dates,
        )  # fmt: skip
        request.unlink()
        extensions.unlink()

    def _openssl(self, *words: str) -> None:
        done = subprocess.run(["openssl", *words], cwd=self.directory, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
