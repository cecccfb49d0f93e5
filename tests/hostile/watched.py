"""`watched.py FOLDER COMMAND [ARG ...]`: a command of `loop.commands`, within a limit of memory.

It notes in FOLDER/events, a line each, what no input may make it do: connect, ask a person, load a
pickle, start a program, or write outside of FOLDER.
"""

import importlib
import os
import re
import resource
import sys
from pathlib import Path

MEMORY = 3 * 2**30  # bytes beyond what is mapped at the start
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link")
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
OTHERS = ("builtins.input", "pickle.find_class")


def watch(folder: str) -> None:
    """Has Python tell what it is about to do, from now on."""
    events = os.open(os.path.join(folder, "events"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    own = (folder, os.environ["XDG_CACHE_HOME"], "/dev/", "/proc/")

    def outside(path) -> bool:
        return isinstance(path, (str, bytes)) and not os.path.realpath(
            os.fsdecode(path)
        ).startswith(own)

    def note(event: str, args: tuple) -> None:
        is_new = (
            (event == "socket.connect" and "127.0.0.1" not in str(args[1]))
            or (event == "open" and (args[2] or 0) & WRITING and outside(args[0]))
            or (event in CHANGES and outside(args[0]))
            or (event in PROGRAMS and "ldconfig" not in str(args))
            or event in OTHERS
        )
        if is_new:
            told = re.sub(r"tmp\w{8}", "tmp*", str(args).replace(folder, "FOLDER"))
            os.write(events, f"{event} {told[:300]}\n".encode(errors="replace"))

    sys.addaudithook(note)


def main() -> None:
    folder, command, *argv = sys.argv[1:]
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    module = importlib.import_module(f"loop.commands.{command}")
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch(os.path.realpath(folder))
    module.main(argv)


if __name__ == "__main__":
    main()
