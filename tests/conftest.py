"""What all tests share: where CI runs them nothing may be skipped, and nowhere is slowness a failure."""

import os
import resource

import pytest
from hypothesis import HealthCheck, settings

STRICT = os.environ.get("CI") == "true"

# A deadline of hypothesis is for one example; a machine that does something else meanwhile misses any.
settings.register_profile(
    "tests", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=STRICT
)
settings.load_profile("tests")

# Where a group may write is refused in places, and some users' files are made so.
os.umask(0o022)

# Some thousand tests in one process: what one leaves to the garbage collector is not to fail another.
DESCRIPTORS = 8192
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
if soft < DESCRIPTORS:
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(DESCRIPTORS, hard), hard))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    """In CI a skipped test fails the run: a machine that cannot run it does not say that it passes."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if STRICT and reporter is not None and reporter.stats.get("skipped") and exitstatus == pytest.ExitCode.OK:
        reporter.write_line("CI: tests were skipped, see the reasons above", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
