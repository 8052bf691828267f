"""The secondary that most tests use."""

import pytest

from tests.unit.replication.secondary.site import LENGTH, OLD, Site


@pytest.fixture(params=[True, False], ids=["durable", "buffered"])
def site(tmp_path, request):
    site = Site(tmp_path, durable=request.param)
    site.disk.data[:] = bytes([OLD]) * LENGTH
    return site
