"""How much of a training set a run remembers: made-up identifiers, planted a known number of times, against ones it never saw.

The measure is the exposure of "The Secret Sharer" (Carlini et al. 2019, arXiv 1802.08232, section 4): a canary is a sentence with a random number
in it; the trained model ranks it among numbers that were never there; the exposure is log2 of how many there are less log2 of its rank:
by chance 1.44 bits on average (a rank drawn evenly), log2 of all for a number that is ranked first.
`./launch.sh evaluate --canaries N [--repeats 1,4,16] [--config FILE] [key=value ...]` trains by the ordinary loop on the planted copy.
"""

import re

import numpy as np
import torch

from ..checkpoint.run_dir import write_report
from ..config.cli import load_config, take_options
from ..config.deepspeed import build_ds_config
from ..config.schema import ConfigError
from ..distributed.world import init_distributed
from ..evaluation.memorization import REFERENCES, measure, prepare, table, times_seen
from ..model.loading import load_tokenizer
from ..train import train
from .train import FAILED, leave_failed


def main(args: list[str]) -> None:
    """What `evaluate --canaries` does. Raises ConfigError."""
    options = take_options(args, {"--canaries": None, "--repeats": "1,4,16"})
    if not re.fullmatch(r"[1-9]\d{0,3}", options["--canaries"]) or not re.fullmatch(
        r"[1-9]\d{0,3}(,[1-9]\d{0,3})*", options["--repeats"]
    ):
        raise ConfigError(
            f"--canaries {options['--canaries']} --repeats {options['--repeats']}: a whole number, and whole numbers with commas"
        )

    config = load_config(args)
    ranks = init_distributed(config.run)
    config, canaries = prepare(
        config,
        int(options["--canaries"]),
        sorted({int(n) for n in options["--repeats"].split(",")}),
        ranks,
    )
    tokenizer = load_tokenizer(config.base, config.revision)
    seen = times_seen(config, tokenizer, canaries)
    try:
        report = train(config, build_ds_config(config))
    except FAILED as error:
        leave_failed(error)
    if report and report["steps"] == report["planned_steps"]:
        exposures = measure(config, canaries, tokenizer, ranks.device)
        write_report(
            config.folder,
            {
                "canaries": [
                    vars(c) | {"seen": n, "exposure": bits}
                    for c, n, bits in zip(canaries, seen, exposures)
                ]
            },
        )
        print(
            f"\nexposure of made-up record numbers, of at most {np.log2(REFERENCES + 1):.0f} bits; 1.44 on average by chance"
        )
        print("\n".join(table(canaries, seen, exposures)))
    torch.distributed.destroy_process_group()
