"""`./launch.sh profile`: where a step's time goes.

It writes a trace of three steps for Perfetto (https://ui.perfetto.dev) and a table. The loop runs
as `train` runs it, on as many ranks, with another logger. It ends after the recorded steps, and
nothing is evaluated or saved.
"""

import os
import shutil
import sys

import torch.distributed as dist

from ..config.cli import load_config
from ..config.deepspeed import build_ds_config
from ..config.schema import ConfigError
from ..distributed import timeline
from ..distributed.exit import exit_with_config_error
from ..kernels.attention import AttentionError
from ..monitor.kernel_profile import STEPS, WARM_UP, ProfileFinished, ProfilingLogger, write_profile
from ..monitor.quiet import quiet_libraries
from ..train import train
from .train import FAILED, exit_with_failure


def profiling_options(run_name: str) -> list[str]:
    """The settings of a run that only trains, for as many steps as are timed."""
    return [
        f"run.name={run_name}/profile/steps",
        "run.resume=false",
        "run.export_check_examples=0",
        "run.max_hours=null",
        f"max_steps={WARM_UP + STEPS}",
        f"epochs={WARM_UP + STEPS}",
        "warmup_steps=0",
        "data.valid=null",
        "data.valid_fraction=0",
        "monitor.sample_notes=[]",
        "monitor.best=loss",
        "run.export=last",
        "run.patience=null",
    ]


def main(argv: list[str] | None = None) -> None:
    timeline.begin()
    quiet_libraries(output_is_log=True)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's notices of its start and end
    args = sys.argv[1:] if argv is None else argv
    main_rank = os.environ.get("RANK", "0") == "0"
    try:
        profiled = load_config(args)
        config = load_config([*args, *profiling_options(profiled.run.name)])
        ds_config = build_ds_config(config)
        if main_rank:
            shutil.rmtree(config.folder, ignore_errors=True)  # of one that was killed
        train(config, ds_config, make_logger=ProfilingLogger)
        message = "asked to stop before the steps were recorded: there is no trace"
    except (ConfigError, AttentionError) as error:
        exit_with_config_error(error)
    except FAILED as error:
        exit_with_failure(error)
    except ProfileFinished as finished:
        message = ""
        if main_rank:
            message = write_profile(profiled.folder / "profile", *finished.args)
    dist.barrier()  # nobody writes a heartbeat any more
    if main_rank:
        shutil.rmtree(config.folder, ignore_errors=True)
        print(message)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
