"""What all tests share: where CI runs them nothing may be skipped."""

import os

import pytest

STRICT = os.environ.get("CI") == "true"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    """In CI a skipped test fails the run: a machine that cannot run it does not say that it passes."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if STRICT and reporter is not None and reporter.stats.get("skipped") and exitstatus == pytest.ExitCode.OK:
        reporter.write_line("CI: tests were skipped, see the reasons above", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
