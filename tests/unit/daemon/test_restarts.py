"""How soon a worker is started again."""

from tcmu_replication.daemon.restarts import Restarts

KERNEL_TIME_OUT_S = 30.0
"""cmd_time_out of a backstore, as the kernel sets it."""


def test_first_deaths_are_answered_at_once_and_later_ones_ever_later() -> None:
    restarts = Restarts((0.0, 1.0, 5.0), stable_s=60)
    assert [restarts.died(1, hopeless=False) for _ in range(5)] == [0.0, 1.0, 5.0, 5.0, 5.0]
    assert restarts.count == 5


def test_worker_that_lived_long_begins_anew() -> None:
    restarts = Restarts((0.0, 1.0, 5.0), stable_s=60)
    restarts.died(1, hopeless=False)
    restarts.died(1, hopeless=False)
    assert restarts.died(60, hopeless=False) == 0.0
    assert restarts.died(1, hopeless=False) == 1.0


def test_hopeless_worker_waits_longest_from_the_first() -> None:
    assert Restarts((0.0, 1.0, 5.0), hopeless_s=30.0).died(1, hopeless=True) == 30.0


def test_no_delay_and_a_start_after_it_reach_the_kernels_time_out() -> None:
    """lio-findings 5: eight deaths in a row were an I/O error at the initiator."""
    restarts = Restarts()
    assert max(restarts.died(1, hopeless=False) for _ in range(20)) <= KERNEL_TIME_OUT_S / 2
