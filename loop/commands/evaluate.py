"""How good the model is on a split: token-weighted loss, and its notes scored beside what they have to beat."""

import sys
from pathlib import Path

import deepspeed
import torch

from ..checkpoint.run_dir import write_report
from ..config.cli import load_config, take_options
from ..config.deepspeed import build_ds_config
from ..config.schema import Config, ConfigError
from ..data.conversations import read_split
from ..data.dataset import load_examples
from ..distributed.exit import exit_process, exit_with_config_error
from ..distributed.rendezvous import RendezvousError
from ..distributed.seeding import seed_everything
from ..distributed.world import init_distributed
from ..evaluation.baselines import score_with_baselines
from ..evaluation.html_report import write_page
from ..evaluation.loss import example_losses
from ..evaluation.scoring import as_table, interval, ratio, unsupported
from ..export.audit import AuditError, check_adapter
from ..generation.notes_file import read_predictions
from ..generation.sharded import generate_sharded
from ..kernels.attention import AttentionError
from ..kernels.attention_backends import choose_backend
from ..model.loading import load_model, load_model_config, load_tokenizer
from ..model.lora import read_adapter
from ..model.quantization import compute_dtype
from ..model.structure import attention_shape
from ..monitor.quiet import quiet_libraries
from .canaries import main as measure_canaries


def evaluate(
    config: Config,
    adapter: str | None,
    split: str,
    notes: int | None,
    predictions: str | None = None,
    reference: str | None = None,
    html: str | None = None,
) -> dict:
    """Loads base and adapter under ZeRO-3 as in training and returns the figures of a split, on rank 0. notes: how many examples to write
    notes for, None for all. predictions: score this file's notes instead, without a model. reference: the column to score against."""
    columns = config.data.columns | ({"note": reference} if reference else {})
    texts = config.model_copy(
        update={"data": config.data.model_copy(update={"columns": columns, "headings": "optional"})}
    )
    report: dict = {"figures": {}}
    if not getattr(config.data, split) and not (split == "valid" and config.data.valid_fraction):
        raise ConfigError(
            f"data.{split} is not set"
            + "; --split valid takes the share that was held out" * bool(config.data.valid_fraction)
        )
    if reference and "messages" in config.data.columns:
        raise ConfigError(
            f"--reference {reference}: data.columns maps messages, which hold the note already; map dialogue and note"
        )
    if html and not Path(html).resolve().parent.is_dir():
        raise ConfigError(f"--html {html}: there is no such folder")
    conversations = {c.id: c for c in read_split(texts, split)[0]}
    train = read_split(texts, "train")[0] if notes != 0 else []
    if predictions:
        ids = list(conversations)[:notes]
        written = read_predictions(predictions, ids)
        ranks = init_distributed(config.run)
    else:
        ds = build_ds_config(config)
        tokenizer, shape = (
            load_tokenizer(config.base, config.revision),
            load_model_config(config.base, config.revision),
        )
        examples, account = load_examples(config, tokenizer, split)
        chosen = [e for e in examples if e.id in conversations][
            :notes
        ]  # the --reference column may lack some
        ids, ranks = [e.id for e in chosen], init_distributed(config.run)
        seed_everything(config.seed)
        backend, _ = choose_backend(config.attention, ranks.device, compute_dtype(ds), attention_shape(shape))
        engine = deepspeed.initialize(
            model=load_model(config, ds, ranks.device, backend, adapter=adapter), config=ds
        )[0]
        rows = 1 if config.micro_batch_size == "auto" else config.micro_batch_size
        losses = example_losses(
            engine, examples, rows * config.max_seq_len, config.max_seq_len, ranks
        )
        assert losses is not None  # there was nothing that could have asked it to stop
        report |= {"examples": len(examples), "left out": account.rows - account.kept}
        report["figures"]["loss"] = dict(
            zip(("value", "low", "high"), (ratio(losses), *interval(losses)))
        )
        written = generate_sharded(
            engine, tokenizer, chosen, config.monitor.sample_max_new_tokens, ranks
        )
    if ids:
        scored, figures = score_with_baselines(
            [conversations[key] for key in ids], written, train, ranks
        )
        report |= {"notes": len(ids), "figures": report["figures"] | figures}
        report["unsupported"] = {
            row.id: found
            for row in scored
            if (found := sorted({f"{f.kind}: {f.value}" for f in unsupported(row)}))
        }
        if html and ranks.is_main:
            write_page(
                Path(html), f"{split}, {len(ids)} notes", scored, as_table(report["figures"])
            )
    return report if ranks.is_main else {}


def main(argv: list[str] | None = None) -> None:
    """`evaluate [--adapter DIR] [--split test] [--notes N] [--predictions FILE] [--reference COLUMN] [--html FILE] [--config FILE] [key=value]`"""
    from torch.utils.tensorboard import SummaryWriter

    quiet_libraries()
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if "--canaries" in args:
            return measure_canaries(args)
        options = take_options(
            args,
            dict.fromkeys(("--adapter", "--notes", "--predictions", "--reference", "--html"))
            | {"--split": "test"},
        )
        split, notes, predictions = options["--split"], options["--notes"], options["--predictions"]
        if split not in ("train", "valid", "test"):
            raise ConfigError(f"--split {split}: one of train, valid, test")
        if notes is not None and not notes.isdigit():
            raise ConfigError(f"--notes {notes}: must be a whole number")
        config = load_config(args)
        trained = config.folder / ("model" if config.method == "full" else "adapter")
        adapter = options["--adapter"] or (
            str(trained) if trained.is_dir() and config.method != "full" else None
        )
        if adapter and config.method == "full":
            raise ConfigError(
                f"--adapter {adapter}: the configuration says method=full, which has none; leave one of them out"
            )
        if (
            adapter and not predictions
        ):  # the rounding of the base that it was trained on, whatever the configuration says
            config = config.model_copy(
                update={
                    key: read_adapter(adapter)[key]
                    for key in ("method", "double_quant", "revision")
                }
            )
            check_adapter(adapter, config.base)
        elif trained.is_dir():
            config = config.model_copy(update={"base": str(trained)})
        count = 0 if config.data.supervise == "all" else notes and int(notes)
        report = evaluate(
            config, adapter, split, count, predictions, options["--reference"], options["--html"]
        )
    except (ConfigError, AttentionError) as error:
        exit_with_config_error(error)
    except (AuditError, RendezvousError) as error:
        exit_process(1, f"error: {error}")
    if report:
        name = f"{split}/{Path(predictions).stem}" if predictions else split
        print(
            f"{split}, {predictions or adapter or f'{config.base} without an adapter'}: "
            + ", ".join(
                f"{report[key]:,} {key}"
                for key in ("examples", "left out", "notes")
                if key in report
            )
            + "\n"
            + as_table(report["figures"])
        )
        if config.folder.is_dir():
            steps = write_report(config.folder, {f"evaluate/{name}": report}).get("steps", 0)
            with SummaryWriter(str(config.folder / "tensorboard" / "evaluate")) as board:
                for key, figure in report["figures"].items():
                    board.add_scalar(f"{name}/{key}", figure["value"], steps)
            print(f"with every unsupported fact in {config.folder / 'report.json'}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
