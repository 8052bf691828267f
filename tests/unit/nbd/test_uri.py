"""NBD addresses."""

from __future__ import annotations

import pytest

from tcmu_replication.errors import Error, Kind
from tcmu_replication.nbd import uri
from tcmu_replication.nbd.uri import Tcp, Unix, Uri

GOOD = {
    "nbd://beta/disk0": Uri(Tcp("beta", 10809), "disk0"),
    "nbd://10.0.0.2:7001/disk0": Uri(Tcp("10.0.0.2", 7001), "disk0"),
    "nbd://[fd00::2]:7001/disk0": Uri(Tcp("fd00::2", 7001), "disk0"),
    "nbd://beta": Uri(Tcp("beta"), ""),
    "nbd://beta/a%2Fb%20c": Uri(Tcp("beta"), "a/b c"),
    "nbd+unix:///disk0?socket=/run/nbd.sock": Uri(Unix("/run/nbd.sock"), "disk0"),
    "nbd+unix:///?socket=/run/a%26b": Uri(Unix("/run/a&b"), ""),
    "nbds://beta:7001/disk0": Uri(Tcp("beta", 7001), "disk0", tls=True),
    "nbds+unix:///disk0?socket=/run/nbd.sock": Uri(Unix("/run/nbd.sock"), "disk0", tls=True),
}

BAD = [
    "",
    "beta:10809",
    "http://beta/disk0",
    "nbdx://beta/disk0",
    "nbds://beta/disk0?tls-certificates=/etc/tls",
    "nbd:///disk0",
    "nbd://beta:99999/disk0",
    "nbd://beta:ten/disk0",
    "nbd://beta/disk0?socket=/run/x",
    "nbd://[fd00::2/disk0",
    "nbd+unix:///disk0",
    "nbd+unix:///disk0?socket=",
    "nbd+unix:///disk0?socket=/a&socket=/b",
    "nbd+unix:///disk0?sock=/a",
    "nbd+unix://beta/disk0?socket=/a",
]


@pytest.mark.parametrize("text", GOOD)
def test_uri_is_read(text: str) -> None:
    assert uri.parse(text) == GOOD[text]


@pytest.mark.parametrize("text", GOOD)
def test_uri_is_read_back_from_what_was_written(text: str) -> None:
    assert uri.parse(uri.format(*GOOD[text])) == GOOD[text]


@pytest.mark.parametrize("text", BAD)
def test_uri_that_is_wrong_says_what_was_expected(text: str) -> None:
    with pytest.raises(Error, match="expected nbd://HOST") as caught:
        uri.parse(text)
    assert caught.value.kind is Kind.BAD_CONFIG
