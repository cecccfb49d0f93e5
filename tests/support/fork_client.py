"""The `python` of the tests: asks fork_server.py for a fork, and stands for it.

It passes on the arguments, the folder, the environment, the three streams and signals, and ends as
the fork ends. When it is killed, so is the fork. A true Python runs in its place where a fork would
be something else: options of Python, passed-on files, another environment of what libraries read at
import, and processes that look after children of their own. Starts in 20 ms, so imports little.
"""

import contextlib
import json
import os
import signal
import socket
import sys
from pathlib import Path

# They signal the ranks that they have started, which they find as their children.
PARENTS = (
    "deepspeed.launcher.launch",
    "loop.distributed.launcher",
    "loop.distributed.start_ranks",
)
PASSED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
LONGEST = 2**17  # bytes of a request


def be_python(python: str, client: str, args: list[str]) -> None:
    """Is `python ARGS`: a fork, or the true Python with this name.

    Args:
        python: the true one.
        client: the path of this one; the server's socket is beside it.
        args: the command line.
    """
    plain = args[1:] if args[:1] == ["-u"] else args
    if plain[:1] == ["-m"] and plain[1] in PARENTS:
        server = Path(__file__).with_name("fork_server.py")
        os.execv(python, [python, "-u", str(server), client, *plain])
    if plain and (plain[0] in ("-c", "-m") or plain[0][0] != "-") and only_streams_are_passed():
        code = ask(client, plain)
        if code is not None:
            end_with(code)
    os.execv(python, [python, *args])


def only_streams_are_passed() -> bool:
    passed = []
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # that of the listing is closed by now
            passed += [fd] if os.get_inheritable(fd) else []
    return set(passed) == {0, 1, 2}


def ask(client: str, args: list[str]) -> int | None:
    """Returns the exit code of a fork, that of a signal negative; None if there is no fork."""
    numbers = set(signal.Signals) - {signal.SIGPIPE, signal.SIGXFSZ}  # Python ignores these
    ignored = [int(n) for n in numbers if signal.getsignal(n) is signal.SIG_IGN]
    request = {"args": args, "env": dict(os.environ), "cwd": os.getcwd(), "ignored": ignored}
    text = json.dumps(request).encode()
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        server.connect(str(Path(client).with_name("socket")))
    except OSError:
        return None
    if len(text) > LONGEST:
        return None

    def pass_on(number: int, frame) -> None:
        with contextlib.suppress(OSError):  # the fork has ended
            server.send(b"%d" % number)

    socket.send_fds(server, [text], [0, 1, 2])
    for number in set(PASSED_ON) - set(ignored):
        signal.signal(number, pass_on)
    with contextlib.suppress(ConnectionError):
        answer = server.recv(64)
        return None if answer == b"none" else int(answer or -signal.SIGKILL)
    return -int(signal.SIGKILL)  # the server is gone


def end_with(code: int) -> None:
    if code >= 0:
        os._exit(code)
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
    signal.pause()


if __name__ == "__main__":
    be_python(*sys.argv[1:3], sys.argv[3:])
