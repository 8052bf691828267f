"""Every kind has an exit status, and every exit status a meaning."""

from tcmu_replication.cli import exits
from tcmu_replication.errors import Kind


def test_tables_are_complete() -> None:
    assert set(exits.STATUS_OF_KIND) == set(Kind)
    assert set(exits.STATUS_OF_KIND.values()) | {0, exits.UNPROTECTED} == set(exits.MEANINGS)
