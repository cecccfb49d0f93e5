"""A stranger's program runs within limits of time and memory, and leaves none behind."""

import os
import resource
import signal
import time

import psutil
import pytest

from loop.untrusted.limits import LimitError, limited, try_in_child


def spin(seconds: float) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return "done"


def test_what_takes_too_long_is_ended_and_the_clock_is_put_back():
    handler = signal.getsignal(signal.SIGALRM)
    with pytest.raises(LimitError, match=r"took more than 0.05 s"), limited(0.05):
        spin(5)
    assert signal.getsignal(signal.SIGALRM) == handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_what_takes_too_much_memory_is_ended_and_the_limit_is_put_back():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(LimitError, match="took more than 0.0625 GiB of memory"):
        with limited(memory=2**26):
            bytearray(2**31)  # more than this process may give back meanwhile
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    with limited():
        bytearray(2**28)  # less than a GiB


def test_a_call_without_an_end_is_said():
    def call():
        return call()

    with pytest.raises(LimitError, match="calls itself without an end"), limited():
        call()


def fail():
    raise ValueError("a patient's words")


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (lambda: spin(10), "took more than 0.5 s"),
        (fail, "raised ValueError"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "died"),
        (lambda: bytearray(2**32), "took more than 1 GiB of memory"),
    ],
)
def test_a_child_that_fails_is_said_without_its_words_and_is_gone(work, words):
    before = psutil.Process().children()
    with pytest.raises(LimitError, match=words) as failed:
        try_in_child(work, seconds=0.5 if "0.5" in words else 60)
    assert "patient" not in str(failed.value)
    assert psutil.Process().children() == before


def test_a_childs_text_comes_back():
    assert try_in_child(lambda: "Ä: " + "x" * 9) == "Ä: xxxxxxxxx"
