"""`./launch.sh board [DIR]`: TensorBoard on the runs of a folder, for this machine alone.

What it shows may be of patients (sample notes), so it listens on 127.0.0.1 and nowhere else. To look from another machine, forward the
port over ssh: `ssh -L 6006:localhost:6006 HOST`.
"""

import signal
import sys
from pathlib import Path

from tensorboard import program

from ..config.schema import ConfigError
from ..distributed.exit import exit_with_config_error

HOST = "127.0.0.1"
CHARTS = "#custom_scalars&_smoothingWeight=0"  # TensorBoard would show averages, even of counts


def open_board(folder: Path) -> str:
    """Serves in threads of this process and returns the address: port 6006, or the next free one."""
    if not folder.is_dir():
        raise ConfigError(
            f"board {folder}: no such folder; give the one that holds the runs (run.dir of the configuration)"
        )
    board = program.TensorBoard()
    # its data server is a process of its own with a port of its own; reading in this process is fast enough for a few runs
    board.configure(["", "--logdir", str(folder), "--host", HOST, "--load_fast", "false"])
    try:
        return board.launch()
    except program.TensorBoardServerException as error:
        raise ConfigError(f"board: {error.msg}") from error


def main(argv: list[str] | None = None) -> None:
    args = sys.argv[1:] if argv is None else argv
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(0))
    try:
        if len(args) > 1 or any(a.startswith("-") for a in args):
            raise ConfigError(f"board takes at most one folder, not: {' '.join(args)}")
        folder = Path(*args or ["runs"])
        address = open_board(folder)
    except ConfigError as error:
        exit_with_config_error(error)
    runs = len({p.parent for p in folder.rglob("events.out.tfevents.*")})
    print(
        f"{address}{CHARTS}\nshows {runs} run(s) of {folder}, to this machine alone. Ctrl-C ends it",
        flush=True,
    )
    signal.pause()


if __name__ == "__main__":
    main()
