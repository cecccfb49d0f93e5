"""`evaluate`: the loss of a split, and its notes scored beside what they have to beat."""

import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

from ..config import late_compile  # noqa: F401  # before what imports bitsandbytes

# isort: split
from ..checkpoint.identity import base_fingerprint
from ..checkpoint.run_dir import write_report
from ..config.cli import load_config, take_options
from ..config.deepspeed import build_ds_config
from ..config.schema import Config, ConfigError
from ..distributed import timeline
from ..distributed.exit import exit_process, exit_with_config_error
from ..distributed.files import sha256
from ..distributed.rendezvous import RendezvousError
from ..evaluation.run import (
    EvaluationOptions,
    EvaluationStopped,
    challenge_split,
    evaluate_split,
)
from ..evaluation.scoring import as_table
from ..export.audit import WEIGHTS, AuditError, check_adapter
from ..export.card import record_evaluation
from ..facts.challenge import as_table as challenge_table
from ..generation.notes_file import digest
from ..generation.prompt import check_prompt, task_of
from ..kernels.attention import AttentionError
from ..model.loading import load_tokenizer
from ..model.lora import read_adapter
from ..model.quantization import compute_dtype
from ..monitor.quiet import quiet_libraries
from .canaries import main as measure_canaries
from .train import exit_with_failure


def take_evaluation_options(args: list[str]) -> EvaluationOptions:
    """The command's own options, taken out of `args`. Raises ConfigError."""
    names = ("--adapter", "--notes", "--predictions", "--reference", "--html", "--compare")
    taken = take_options(args, dict.fromkeys(names) | {"--split": "test"})
    split = taken["--split"]
    num_notes = taken["--notes"]
    if split not in ("train", "valid", "test"):
        raise ConfigError(f"--split {split}: one of train, valid, test")
    if num_notes is not None and not re.fullmatch(r"[0-9]{1,9}", num_notes):
        raise ConfigError(f"--notes {num_notes}: must be a whole number")
    return EvaluationOptions(
        split=split,
        adapter=taken["--adapter"],
        num_notes=None if num_notes is None else int(num_notes),
        predictions=taken["--predictions"],
        reference=taken["--reference"],
        html=taken["--html"],
        compare=tuple(filter(None, (taken["--compare"] or "").split(","))),
    )


def choose_weights(config: Config, options: EvaluationOptions) -> tuple[Config, EvaluationOptions]:
    """The configuration and the options with the weights to evaluate.

    Without --adapter these are the run's own, if there are any. Raises ConfigError, and AuditError
    for an adapter of another base.
    """
    if config.method == "full":
        if options.adapter:
            raise ConfigError(
                f"--adapter {options.adapter}: the configuration says method=full, which has none; "
                "leave one of them out"
            )
        trained = config.folder / "model"
        if trained.is_dir():
            config = config.model_copy(update={"base": str(trained)})
        return config, options
    adapter = options.adapter
    if not adapter and (config.folder / "adapter").is_dir():
        adapter = str(config.folder / "adapter")
    if adapter and not options.predictions:
        # The rounding of the base that it was trained on, whatever the configuration says.
        trained_on = read_adapter(adapter)
        keys = ("method", "double_quant", "revision")
        update = {key: trained_on[key] for key in keys}
        update["task"] = task_of(trained_on, config.task)
        config = config.model_copy(update=update)
        check_adapter(adapter, config.base)
    return config, dataclasses.replace(options, adapter=adapter)


def take_flag(args: list[str], name: str) -> bool:
    """Whether the flag is among `args`, out of which it is taken."""
    given = name in args
    if given:
        args.remove(name)
    return given


def challenge_scorer(args: list[str]) -> None:
    """Prints what the scorer notices in references that were made wrong. Raises ConfigError."""
    options = take_evaluation_options(args)
    given = [n for n in ("adapter", "predictions", "html", "compare") if getattr(options, n)]
    if given:
        raise ConfigError(
            f"--{given[0]}: --challenge tries the scorer on the reference notes alone"
        )
    config = load_config(args)
    if os.environ.get("RANK", "0") == "0":
        counts = challenge_split(config, options)
        print(f"{options.split}, its reference notes\n{challenge_table(counts)}")


def own_folder(config: Config, options: EvaluationOptions) -> Path | None:
    """The folder of the trained weights that are evaluated; None for a base alone or a file."""
    if options.predictions:
        return None
    if options.adapter:
        return Path(options.adapter)
    model = config.folder / "model"
    return model if config.method == "full" and model.is_dir() else None


def check_own_prompt(config: Config, options: EvaluationOptions) -> None:
    """Raises ConfigError where the weights can't be asked with the prompt of their training."""
    folder = own_folder(config, options)
    if folder:
        tokenizer = load_tokenizer(config.base, config.revision)
        check_prompt("--adapter" if options.adapter else "base", str(folder), tokenizer)


def written_by(config: Config, options: EvaluationOptions) -> dict[str, Any]:
    """What makes the notes of these weights differ from others': hashes, and the base's storage.

    Raises ConfigError where the base cannot be read.
    """
    adapter = None
    if options.adapter:
        # The configuration has the adapter's scale.
        files = [Path(options.adapter) / name for name in ("adapter_config.json", WEIGHTS)]
        adapter = digest("".join(sha256(path) for path in files))
    return {
        "base_fingerprint": base_fingerprint(config.base, config.revision),
        "adapter": adapter,
        "storage": config.quantization,
        "double_quant": config.double_quant,
        "dtype": str(compute_dtype(build_ds_config(config))).removeprefix("torch."),
    }


def print_report(config: Config, options: EvaluationOptions, report: dict) -> None:
    evaluated = options.predictions or options.adapter or f"{config.base} without an adapter"
    keys = ("examples", "left out", "notes", "notes reused", "notes written")
    counts = [f"{report[key]:,} {key}" for key in keys if key in report]
    print(f"{options.split}, {evaluated}: {', '.join(counts)}")
    print(as_table(report["figures"], config.task))
    if "challenge" in report:
        print(challenge_table(report["challenge"]))
    print(f"time: {timeline.describe(report['time'])}")


def record_report(config: Config, options: EvaluationOptions, report: dict) -> str:
    """Adds the report to the run's report.json and TensorBoard, if there is such a run.

    Returns what to print of it.
    """
    from torch.utils.tensorboard import SummaryWriter  # late: it takes a second

    if not config.folder.is_dir():
        return ""
    name = options.split
    if options.predictions:
        name = f"{name}/{Path(options.predictions).stem}"
    steps = write_report(config.folder, {f"evaluate/{name}": report}).get("steps", 0)
    with SummaryWriter(str(config.folder / "tensorboard" / "evaluate")) as board:
        for key, metric in report["figures"].items():
            board.add_scalar(f"{name}/{key}", metric["value"], steps)
    return f"with every unsupported fact in {config.folder / 'report.json'}"


def record_in_card(config: Config, options: EvaluationOptions, report: dict) -> None:
    """Adds the figures to the card of the weights that were evaluated, if they have one."""
    folder = own_folder(config, options)
    if not folder:
        return
    reference = f", against {options.reference}" if options.reference else ""
    try:
        record_evaluation(folder, f"{options.split}{reference}", report)
    except (OSError, ConfigError) as error:
        print(f"not in the card of {folder}: {error}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    timeline.begin()
    quiet_libraries()
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if "--canaries" in args:
            return measure_canaries(args)
        if take_flag(args, "--challenge"):
            return challenge_scorer(args)
        any_prompt = take_flag(args, "--any-prompt")
        options = take_evaluation_options(args)
        config, options = choose_weights(load_config(args), options)
        if not any_prompt:
            check_own_prompt(config, options)
        if config.data.supervise == "all":  # there is no prompt to write a note for
            options = dataclasses.replace(options, num_notes=0)
        if not options.predictions:
            options = dataclasses.replace(options, by=written_by(config, options))
        report = evaluate_split(config, options)
    except EvaluationStopped as stopped:
        exit_process(130, str(stopped) if os.environ.get("RANK", "0") == "0" else "")
    except (ConfigError, AttentionError) as error:
        exit_with_config_error(error)
    except (AuditError, RendezvousError, torch.OutOfMemoryError) as error:
        exit_with_failure(error)
    if report:
        recorded = record_report(config, options, report)  # first: it may be printed to a full disk
        record_in_card(config, options, report)
        print_report(config, options, report)
        if recorded:
            print(recorded)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
