"""Every kind has an exit status, and every exit status a meaning."""

from tcmu_replication.cli import exits
from tcmu_replication.errors import Kind
from tcmu_replication.replication.protection import TABLE


def test_tables_are_complete() -> None:
    assert set(exits.STATUS_OF_KIND) == set(Kind)
    shown = {0, exits.UNPROTECTED, *exits.STATUS_OF_LEVEL.values()}
    assert set(exits.STATUS_OF_KIND.values()) | shown == set(exits.MEANINGS)
    assert set(exits.WORST_FIRST) == shown


def test_levels_with_a_status_of_their_own_are_those_of_the_verdicts() -> None:
    assert set(exits.STATUS_OF_LEVEL) <= {row.level for row in TABLE}
