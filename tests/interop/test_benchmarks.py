"""The benchmarks run and say something about both sides. (What they say is nobody's promise.)"""

import json

import pytest
from click.testing import CliRunner

from benchmarks import picture, report
from benchmarks.__main__ import main
from benchmarks.rows import ROWS, Sample
from tests.support.tools import requires

pytestmark = pytest.mark.interop


@requires("fio", "qemu-system-x86_64", "qemu-img")
def test_benchmarks_of_little_work(tmp_path):
    arguments = ["--scale", "tiny", "--only", "forwarded,failover,start,ring,limits", "--out", str(tmp_path)]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["rows"]["forwarded-4k-first"]["ratio"] > 0
    assert found["rows"]["commit"]["qemu"]["count"] == found["rows"]["commit"]["ours"]["count"] == 1
    assert {name for name in ROWS if name.startswith(("start", "memory", "ring"))} <= found["rows"].keys()
    assert found["machine"]["qemu"].startswith("QEMU")
    assert (tmp_path / "performance.svg").read_text().startswith("<svg")


def test_ratios_above_one_are_in_our_favour():
    samples = [
        Sample("pause", "QEMU", 30.0), Sample("pause", "ours", 1.0), Sample("pause", "ours", 3.0),
        Sample("commit", "QEMU", 100.0), Sample("commit", "ours", 300.0), Sample("commit", "limit", 600.0),
    ]  # fmt: skip
    found = report.lines(samples)
    assert (found["pause"].ratio, found["pause"].reached) == (15.0, False)
    assert (found["commit"].ratio, found["commit"].of_limit, found["commit"].reached) == (3.0, 0.5, True)
    assert "15.0x" in report.markdown(found)


def test_picture_leaves_out_what_has_no_ratio(tmp_path):
    found = report.lines(
        [Sample("commit", "ours", 300.0), Sample("pause", "QEMU", 2.0), Sample("pause", "ours", 1.0)]
    )
    picture.draw(tmp_path / "picture.svg", found, "a <machine>")
    drawn = (tmp_path / "picture.svg").read_text()
    assert "checkpoint pause" in drawn
    assert "commit" not in drawn
    assert "a &lt;machine&gt;" in drawn
