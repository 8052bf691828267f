"""The demonstration's story, both endings: what `make demo` shows."""

from __future__ import annotations

import pytest

from tests.lab import pair
from tests.lab.conftest import LOGS
from tests.lab.lab import Lab
from tests.lab.story import Ending, Story

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("ending", ["latest", "checkpoint"])
def test_every_byte_is_right_at_the_end(ending: Ending) -> None:
    with Lab(LOGS / f"demo-{ending}") as lab:
        pair.describe(lab)
        for _, happen in Story(lab, ending).chapters():
            happen()
