"""A run in words."""

import pytest

from loop.monitor.summary import describe_duration


@pytest.mark.parametrize(
    "seconds, words",
    [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (27_000, "7.5 h")],
)
def test_a_duration_is_in_the_unit_in_which_one_waits(seconds, words):
    assert describe_duration(seconds) == words
