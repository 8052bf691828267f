"""The benchmarks run and say something about both sides. (What they say is nobody's promise.)"""

import json

import pytest
from click.testing import CliRunner

from benchmarks import images, picture, report, work
from benchmarks.__main__ import main
from benchmarks.memory import CHUNK, Memory
from benchmarks.rows import ROWS, Sample
from tcmu_replication.units import MiB
from tests.support.tools import requires

pytestmark = pytest.mark.interop


@requires("fio", "qemu-system-x86_64", "qemu-img", "nbdkit", "nbdcopy")
def test_benchmarks_of_little_work(tmp_path):
    groups = "forwarded,failover,resync,pause-by-changes,durable,activity,start,ring,limits"
    arguments = ["--scale", "tiny", "--only", groups, "--out", str(tmp_path)]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["rows"]["forwarded-4k-first"]["ratio"] > 0
    assert found["rows"]["commit"]["qemu"]["count"] == found["rows"]["commit"]["ours"]["count"] == 1
    assert found["rows"]["resync-dense"]["ratio"] > 0
    assert {name for name in ROWS if name.startswith("resync-sent")} <= found["rows"].keys()
    assert {name for name in ROWS if name.startswith(("start", "memory", "ring"))} <= found["rows"].keys()
    assert found["rows"]["pause-small"]["others"]["ours, no checkpoint"]["count"] == work.PAUSES
    rows = found["rows"]
    assert rows["activity-on"]["ratio"] == (
        rows["activity-on"]["ours"]["value"] / rows["activity-off"]["ours"]["value"]
    )
    assert found["same_pause"]["same"] in (True, False)
    ways = {name: way["value"] for name, way in found["rows"]["commit"]["others"].items()}
    assert found["rows"]["commit"]["limit"]["value"] == max(ways.values())
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


@pytest.mark.parametrize(("many", "same"), [((1.1, 1.5, 1.9), True), ((2.1, 2.4, 2.8), False)])
def test_pauses_are_the_same_if_their_medians_lie_within_the_quartiles(many, same):
    samples = [Sample("pause-small", "ours", value) for value in (1.0, 1.2, 1.7)]
    samples += [Sample("pause-large", "ours", value) for value in many]
    compared = report.same_pause(report.lines(samples))
    assert compared is not None
    assert compared.same is same
    assert report.same_pause(report.lines(samples[:3])) is None


def test_row_beside_another_has_that_ones_ratio_and_is_not_in_the_picture(tmp_path):
    samples = [Sample("activity-off", "ours", 100.0), Sample("activity-on", "ours", 89.0)]
    found = report.lines(samples)
    assert (found["activity-on"].ratio, found["activity-on"].reached) == (0.89, False)
    assert found["activity-off"].ratio is None
    assert "0.89x" in report.markdown(found)
    assert report.lines(samples[1:])["activity-on"].ratio is None
    picture.draw(tmp_path / "picture.svg", found, "a machine")
    assert "0.9" not in (tmp_path / "picture.svg").read_text()


def test_rows_of_a_disk_are_left_out_where_all_is_in_memory(tmp_path):
    arguments = [
        "--scale",
        "tiny",
        "--only",
        "durable",
        "--disk-directory",
        "/dev/shm",
        "--out",
        str(tmp_path),
    ]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert "--disk-directory" in result.output
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == {}


def test_memory_that_is_lent_is_taken_back():
    with Memory() as memory:
        memory.hold(2 * CHUNK)
        with memory.lent(CHUNK):
            assert memory.held == CHUNK
        assert memory.held <= 2 * CHUNK
    assert memory.held == 0


def test_images_serve_again_once_nobody_holds_them(tmp_path):
    (tmp_path / images.STOCK).mkdir()
    with images.directory(tmp_path) as one, images.directory(tmp_path) as two:
        first = images.full(one / "disk", MiB).stat().st_ino
        assert images.full(two / "disk", MiB).stat().st_ino != first
    with images.directory(tmp_path) as one:
        images.full(one / "larger", 2 * MiB)
        images.full(one / "disk", MiB)
        assert images.full(one / "other", MiB).read_bytes().count(0) < MiB // 2
    assert len(list((tmp_path / images.STOCK).iterdir())) == 3


def test_row_may_be_compared_with_another_than_qemu():
    samples = [
        Sample("resync-dense", "nbdcopy", 100.0), Sample("resync-dense", "ours", 150.0),
        Sample("resync-sent-dense", "limit", 1.0), Sample("resync-sent-dense", "ours", 1.25),
    ]  # fmt: skip
    found = report.lines(samples)
    assert (found["resync-dense"].ratio, found["resync-dense"].reached) == (1.5, True)
    assert (found["resync-sent-dense"].ratio, found["resync-sent-dense"].reached) == (0.8, False)
    assert found["resync-sent-dense"].qemu is None


def test_picture_leaves_out_what_is_not_compared_with_qemu(tmp_path):
    samples = [Sample("commit", "ours", 300.0), Sample("pause", "QEMU", 2.0), Sample("pause", "ours", 1.0)]
    samples += [Sample("resync-dense", "nbdcopy", 100.0), Sample("resync-dense", "ours", 150.0)]
    found = report.lines(samples)
    picture.draw(tmp_path / "picture.svg", found, "a <machine>")
    drawn = (tmp_path / "picture.svg").read_text()
    assert "checkpoint pause" in drawn
    assert "commit" not in drawn
    assert "resync" not in drawn
    assert "a &lt;machine&gt;" in drawn
