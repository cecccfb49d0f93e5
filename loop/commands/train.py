"""`./launch.sh train`: the loop of loop/train.py, its errors as exit codes, and a summary."""

import os
import sys
from typing import NoReturn

import torch
import torch.distributed as dist

from ..config import late_compile  # noqa: F401  # before what imports bitsandbytes
from ..config.cli import load_config
from ..config.deepspeed import build_ds_config
from ..config.device import uses_gpu
from ..config.schema import ConfigError
from ..distributed import timeline
from ..distributed.exit import exit_process, exit_with_config_error
from ..distributed.rendezvous import RendezvousError
from ..distributed.watchdog import RankLost
from ..distributed.world import read_rank_environment
from ..evaluation.choosing import Choice
from ..export.audit import AuditError
from ..kernels.attention import AttentionError
from ..memory.measure import describe_full_gpu
from ..monitor.quiet import quiet_libraries
from ..monitor.summary import show_summary
from ..train import train

# What ends a run without a mistake in what was typed: exit code 1.
FAILED = (
    FloatingPointError,
    AuditError,
    RendezvousError,
    RankLost,
    OSError,
    torch.OutOfMemoryError,
)
# What torch's error says where the memory of a CPU is full.
NO_MEMORY = "can't allocate memory"


def exit_with_failure(error: Exception) -> NoReturn:
    """Ends this rank. What all ranks have in common is said by rank 0 alone."""
    is_main = os.environ.get("RANK", "0") == "0"
    own = isinstance(error, (RendezvousError, RankLost, torch.OutOfMemoryError))
    full = isinstance(error, torch.OutOfMemoryError)
    reason = describe_full_gpu() if full else str(error)
    exit_process(1, f"error: {reason}" if is_main or own else "")


def main(argv: list[str] | None = None) -> None:
    timeline.begin()
    quiet_libraries(output_is_log=True)
    try:
        config = load_config(sys.argv[1:] if argv is None else argv)
        read_rank_environment()
        Choice.of(config)  # a mistake there is said before the data is read
        uses_gpu()  # and so is a GPU that torch can't use
        report = train(config, build_ds_config(config))
    except (ConfigError, AttentionError) as error:
        exit_with_config_error(error)
    except FAILED as error:
        exit_with_failure(error)
    except RuntimeError as error:  # torch has no class for it on the CPU
        if NO_MEMORY not in str(error):
            raise
        exit_process(1, "error: memory ran out: free some, raise its limit, or lower max_seq_len")
    if "exported" in report:
        show_summary(config, report)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # all is written; taking the libraries down can take seconds
