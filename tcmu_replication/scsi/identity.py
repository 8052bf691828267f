"""Who the logical unit is: names, the serial number, and the designators made of them."""

from __future__ import annotations

from typing import NamedTuple


class Identity(NamedTuple):
    """What LIO's configfs says in `wwn/`. `serial` is the unit serial; it is empty until LIO has set one."""

    vendor: str = "LIO-ORG"
    product: str = "replication"
    revision: str = "0001"
    serial: str = ""
    company_id: int = 0x001405


def padded(text: str, length: int) -> bytes:
    """`text` as ASCII, left aligned, in exactly `length` bytes."""
    return text.encode("ascii", "replace")[:length].ljust(length)


def naa(identity: Identity) -> bytes:
    """NAA IEEE Registered Extended, 16 bytes, as LIO makes it: 6, company id, 25 hex digits of the serial.

    What is no hex digit (the dashes of a UUID) is passed over; a short serial is filled up with zeroes.
    """
    digits = "".join(c for c in identity.serial if c in "0123456789abcdefABCDEF")[:25]
    return bytes.fromhex(f"6{identity.company_id & 0xFFFFFF:06x}" + digits.ljust(25, "0"))


def t10(identity: Identity) -> bytes:
    """T10 vendor identification as LIO makes it: vendor, "product:serial", and a NUL; at most 255 bytes."""
    name = f"{identity.product}:{identity.serial}".encode("ascii", "replace")
    return padded(identity.vendor, 8) + name[:246] + b"\0"
