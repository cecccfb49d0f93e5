"""`evaluate --canaries`: how much of its training data a run memorises.

It plants canaries in a copy of the data, trains on that by the ordinary loop, and measures their
exposure (`evaluation.memorization`).
"""

import re

import numpy as np
import torch

from ..checkpoint.run_dir import write_report
from ..config.cli import load_config, take_options
from ..config.deepspeed import build_ds_config
from ..config.schema import ConfigError
from ..distributed.world import init_distributed
from ..evaluation.memorization import (
    NUM_REFERENCES,
    exposure_table,
    measure_exposures,
    prepare_canary_run,
    times_seen,
)
from ..model.loading import load_tokenizer
from ..train import train
from .train import FAILED, exit_with_failure

NUMBER = r"[1-9]\d{0,3}"


def take_canary_options(args: list[str]) -> tuple[int, list[int]]:
    """(canaries for each number of repeats, the numbers of repeats), taken out of `args`.

    Raises ConfigError.
    """
    options = take_options(args, {"--canaries": None, "--repeats": "1,4,16"})
    count = options["--canaries"]
    repeats = options["--repeats"]
    if not re.fullmatch(NUMBER, count) or not re.fullmatch(f"{NUMBER}(,{NUMBER})*", repeats):
        raise ConfigError(
            f"--canaries {count} --repeats {repeats}: a whole number, and whole numbers with commas"
        )
    return int(count), sorted({int(n) for n in repeats.split(",")})


def main(args: list[str]) -> None:
    """Does what `evaluate --canaries` is for. Raises ConfigError."""
    count, repeats = take_canary_options(args)
    config = load_config(args)
    ranks = init_distributed(config.run)
    config, canaries = prepare_canary_run(config, count, repeats, ranks)
    tokenizer = load_tokenizer(config.base, config.revision)
    seen = times_seen(config, tokenizer, canaries)
    try:
        report = train(config, build_ds_config(config))
    except FAILED as error:
        exit_with_failure(error)
    if report and (report["steps"] == report["planned_steps"] or report["ended_early"]):
        exposures = measure_exposures(config, canaries, tokenizer, ranks.device)
        rows = [
            vars(canary) | {"seen": visits, "exposure": bits}
            for canary, visits, bits in zip(canaries, seen, exposures)
        ]
        write_report(config.folder, {"canaries": rows})
        print(
            "\nexposure of made-up record numbers, of at most "
            f"{np.log2(NUM_REFERENCES + 1):.0f} bits; 1.44 on average by chance"
        )
        print("\n".join(exposure_table(canaries, seen, exposures)))
    torch.distributed.barrier()  # a rank that leaves early may abort in a thread of gloo
    torch.distributed.destroy_process_group()
