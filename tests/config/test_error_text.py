"""A library's error in one line."""

import pytest

from loop.config.error_text import first_line


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("a\nb"), "a"),
        (ValueError("\n  a  \nb"), "a  "),
        (ValueError(), "ValueError"),
        (KeyError("x" * 300), "'" + 9 * "x"),
    ],
)
def test_the_first_line_of_an_error_is_cut(error, line):
    assert first_line(error, 10) == line
