"""`./launch.sh board [DIR]`: TensorBoard on the runs of a folder, for this machine alone.

What it shows may be of patients (sample notes), so it listens on 127.0.0.1 and nowhere else. To
look from another machine, forward the port over ssh: `ssh -L 6006:localhost:6006 HOST`.
"""

import signal
import sys
from pathlib import Path

from tensorboard import program

from ..config.schema import ConfigError
from ..distributed.exit import exit_with_config_error

HOST = "127.0.0.1"
CHARTS = "#custom_scalars&_smoothingWeight=0"  # TensorBoard would show averages, even of counts


def parse_folder(args: list[str]) -> Path:
    """The folder on the command line, `runs` by default. Raises ConfigError."""
    if len(args) > 1 or any(arg.startswith("-") for arg in args):
        raise ConfigError(f"board takes at most one folder, not: {' '.join(args)}")
    return Path(args[0]) if args else Path("runs")


def start_board(folder: Path) -> str:
    """Serves in threads of this process; returns the address, with port 6006 or the next free one.

    Raises ConfigError.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"board {folder}: no such folder; give the one that holds the runs (run.dir of the "
            "configuration)"
        )
    board = program.TensorBoard()
    # TensorBoard's data server is a process and a port of its own. Reading in this process is fast
    # enough for a few runs.
    board.configure(["", "--logdir", str(folder), "--host", HOST, "--load_fast", "false"])
    try:
        return board.launch()
    except program.TensorBoardServerException as error:
        raise ConfigError(f"board: {error.msg}") from error


def main(argv: list[str] | None = None) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(0))
    try:
        folder = parse_folder(sys.argv[1:] if argv is None else argv)
        address = start_board(folder)
    except ConfigError as error:
        exit_with_config_error(error)
    num_runs = len({path.parent for path in folder.rglob("events.out.tfevents.*")})
    print(
        f"{address}{CHARTS}\n"
        f"shows {num_runs} run(s) of {folder}, to this machine alone. Ctrl-C ends it",
        flush=True,
    )
    signal.pause()


if __name__ == "__main__":
    main()
