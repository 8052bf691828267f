"""What two hosts agree on, whatever each speaks: the same on both ends, and never a guess."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcmu_replication.control.protocol import SPOKEN, WITHOUT_GREETING, Greeting, Host, Range, Terms, agree
from tcmu_replication.control.schema import COMMANDS
from tcmu_replication.errors import Error, Kind

ROWS = [
    # alpha, beta, the protocol, who is to be upgraded
    ((2, 2), (2, 2), 2, ""),
    ((2, 2), (2, 5), 2, ""),
    ((2, 5), (3, 4), 4, ""),
    ((2, 3), (3, 9), 3, ""),
    ((2, 2), (3, 4), None, "alpha"),
    ((5, 7), (2, 4), None, "beta"),
    ((2, 2), (0, 65535), 2, ""),
    ((2, 2), (65535, 65535), None, "alpha"),
    ((2, 2), (0, 0), None, "beta"),
]


def host(name: str, spoken: tuple[int, int]) -> Host:
    return Host(name, Range(*spoken), f"0.{spoken[1]}.0")


@pytest.mark.parametrize(("alphas", "betas", "protocol", "upgrade"), ROWS)
def test_both_ends_take_the_highest_that_both_speak_or_refuse_in_the_same_words(
    alphas: tuple[int, int], betas: tuple[int, int], protocol: int | None, upgrade: str
) -> None:
    alpha, beta = host("alpha", alphas), host("beta", betas)
    here, there = agree(alpha, beta), agree(beta, alpha)
    assert here.protocol == there.protocol == protocol
    assert here.refusal == there.refusal
    assert (here.version, there.version) == (beta.version, alpha.version)
    if protocol is None:
        assert here.refusal.endswith(f"; upgrade tcmu-replication on {upgrade}")
        for end in (alpha, beta):
            assert f"{end.name} (version {end.version}) speaks {end.spoken}" in here.refusal


def test_range_that_is_reversed_is_refused_though_it_would_overlap() -> None:
    terms = agree(host("beta", (2, 2)), host("alpha", (3, 1)))
    assert terms.protocol is None
    assert "protocols 3 to 1, which is no range" in terms.refusal


def test_terms_without_a_protocol_are_an_error_and_no_number() -> None:
    with pytest.raises(Error, match="no protocol in common") as refused:
        Terms(None, None, "no protocol in common").require()
    assert refused.value.kind is Kind.UNSUPPORTED
    assert Terms(2, None).require() == 2


numbers = st.integers(0, 65535)


@given(numbers, numbers, numbers, numbers)
def test_agreed_protocol_is_in_both_ranges_and_none_is_only_where_there_is_none(
    a: int, b: int, c: int, d: int
) -> None:
    mine, theirs = Range(*sorted((a, b))), Range(*sorted((c, d)))
    found = agree(Host("alpha", mine, "1"), Host("beta", theirs, "1")).protocol
    both = set(range(mine.lowest, mine.highest + 1)) & set(range(theirs.lowest, theirs.highest + 1))
    assert found == max(both, default=None)


def test_protocol_2_stays_spoken_for_hosts_without_a_greeting() -> None:
    assert SPOKEN.lowest <= WITHOUT_GREETING.highest <= SPOKEN.highest


GOOD = {"lowest": 2, "highest": 3, "version": "0.2.0"}
WRONG = {
    "a member is missing": {"lowest": 2, "highest": 3},
    "a number is negative": GOOD | {"lowest": -1},
    "a number is huge": GOOD | {"highest": 1 << 16},
    "a number is no integer of any machine": GOOD | {"highest": 10**400},
    "a number is a string": GOOD | {"lowest": "2"},
    "a number is a fraction": GOOD | {"lowest": 2.5},
    "a number is a boolean": GOOD | {"lowest": True},
    "a number is null": GOOD | {"highest": None},
    "the version is empty": GOOD | {"version": ""},
    "the version is long": GOOD | {"version": "9" * 41},
    "the version has an escape": GOOD | {"version": "1\x1b[2J"},
    "a member is unknown": GOOD | {"facts": {}},
}


@pytest.mark.parametrize("row", WRONG)
def test_greeting_that_is_none_is_refused_by_whoever_gets_it(row: str) -> None:
    with pytest.raises(Error) as asked:
        COMMANDS["peer-greet"].decode(WRONG[row])
    assert asked.value.kind is Kind.BAD_REQUEST
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(WRONG[row], Greeting)


def test_greeting_is_what_it_always_was() -> None:
    """It is given before anything is agreed on: this document can never change."""
    assert Greeting.__struct_encode_fields__ == ("lowest", "highest", "version")
    assert COMMANDS["peer-greet"].decode(GOOD) == Greeting(**GOOD)
