"""How good the model is on a split: token-weighted loss, and its notes scored beside what they have to beat."""

import math
import sys
from pathlib import Path

import deepspeed
import numpy as np
import torch
import torch.nn.functional as F

from .attention import AttentionError
from .audit import AuditError, check_adapter
from .backends import choose_backend
from .cli import exit_with_config_error, leave, load_config, take_options
from .collate import collate
from .config import Config, ConfigError
from .data import load_examples
from .distributed import Ranks, init_distributed, seed_everything
from .ds_config import build_ds_config
from .files import read_predictions
from .folder import write_report
from .join import JoinError
from .model import dtype_of, heads_of, load_model, load_shape, load_tokenizer, read_adapter
from .notes import Note, share_notes
from .packing import cut, make_plan
from .page import write_page
from .score import Row, as_table, interval, most_similar, ratio, score_note, summarise, unsupported
from .sources import Conversation, answer, read_split, said
from .tokens import Example
from .watchdog import doing


@torch.no_grad()
def example_losses(engine, examples: list[Example], capacity: int, max_seq_len: int, ranks: Ranks, stop=None) -> np.ndarray | None:
    """The cross-entropy of each example, summed over its supervised tokens, in nats, and their number: float64 [n, 2], the same on every
    rank. Every rank must call it; dropout is off meanwhile. capacity: tokens of a micro-batch. With `stop`, a StopRequest, it gives up and
    returns None when a rank is asked to end."""
    lengths = np.array([len(e) for e in examples])
    was_training = engine.module.training
    engine.module.eval()
    total = np.zeros((len(examples), 2))
    plan = make_plan(lengths, capacity * ranks.world_size, seed=0)
    for step in range(len(plan)):
        doing(f"evaluating, batch {step + 1} of {len(plan)}")
        if stop and ranks.any(stop.signal is not None):
            engine.module.train(was_training)
            return None
        for ids in cut(plan[step], lengths, ranks.world_size, capacity)[ranks.rank]:
            batch = collate([examples[i] for i in ids], max_seq_len).to(ranks.device)
            logits = engine.module(**batch.model_inputs()).logits  # [1, N, V]
            losses = F.cross_entropy(logits.squeeze(0).float(), batch.targets, ignore_index=-100, reduction="none").double()  # [N]
            document = torch.searchsorted(batch.cu_seqlens, batch.target_positions, right=True) - 1  # [N], whose token it is
            sums = torch.zeros(len(batch.cu_seqlens) - 1, 2, dtype=torch.float64, device=ranks.device)
            sums.index_add_(0, document, torch.stack([losses, (batch.targets != -100).double()], 1))
            total[ids] += sums[: len(ids)].cpu().numpy()
    engine.module.train(was_training)
    return np.array(ranks.sum(*total.flatten())).reshape(-1, 2)


def evaluate_loss(engine, examples: list[Example], capacity: int, max_seq_len: int, ranks: Ranks, stop=None) -> dict[str, float]:
    """Mean cross-entropy over all supervised tokens of `examples`, in nats, and its perplexity; {} when it was asked to stop, and without one.

    A mean of batch means would weigh a short note like a long one and change with the batch size; sums divided once don't. Arguments as in
    `example_losses`."""
    total = example_losses(engine, examples, capacity, max_seq_len, ranks, stop)
    if total is None or (loss := ratio(total)) is None:
        return {}
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700))}


def score_all(conversations: list[Conversation], notes: dict[str, Note], train: list[Conversation], ranks: Ranks) -> tuple[list[Row], dict]:
    """(rows by id, the figures of `summarise`), each rank scoring its share; the same on every rank, whatever their number. train: may be empty."""
    doing("scoring notes")
    rows = [Row(c.id, said(c), answer(c), *notes[c.id]) for c in sorted(conversations, key=lambda c: c.id)]
    mine = rows[ranks.rank :: ranks.world_size]
    nearest = most_similar([row.dialogue for row in mine], [said(c) for c in train]) if train else []
    systems = {
        "notes": [score_note(row) for row in mine],
        **({"nearest note": [score_note(row._replace(note=answer(train[i]), ended=None)) for row, i in zip(mine, nearest)]} if train else {}),
        "dialogue": [score_note(row._replace(note=row.dialogue, ended=None)) for row in mine],
        "reference": [score_note(row._replace(note=row.reference, ended=None)) for row in mine],
    }
    parts = ranks.gather(systems)
    whole = {name: [parts[i % ranks.world_size][name][i // ranks.world_size] for i in range(len(rows))] for name in systems}
    return rows, summarise(whole)


def evaluate(config: Config, adapter: str | None, split: str, notes: int | None, predictions: str | None = None, reference: str | None = None,
             html: str | None = None) -> dict:  # fmt: skip
    """Loads base and adapter under ZeRO-3 as in training and returns the figures of a split, on rank 0. notes: how many examples to write
    notes for, None for all. predictions: score this file's notes instead, without a model. reference: the column to score against."""
    columns = config.data.columns | ({"note": reference} if reference else {})
    texts = config.model_copy(update={"data": config.data.model_copy(update={"columns": columns, "headings": "optional"})})
    report: dict = {"figures": {}}
    if not getattr(config.data, split) and not (split == "valid" and config.data.valid_share):
        raise ConfigError(f"data.{split} is not set" + "; --split valid takes the share that was held out" * bool(config.data.valid_share))
    if reference and "messages" in config.data.columns:
        raise ConfigError(f"--reference {reference}: data.columns maps messages, which hold the note already; map dialogue and note")
    if html and not Path(html).resolve().parent.is_dir():
        raise ConfigError(f"--html {html}: there is no such folder")
    conversations = {c.id: c for c in read_split(texts, split)[0]}
    train = read_split(texts, "train")[0] if notes != 0 else []
    if predictions:
        ids = list(conversations)[:notes]
        written = read_predictions(predictions, ids)
        ranks = init_distributed(config.run.join_minutes)
    else:
        ds = build_ds_config(config)
        tokenizer, shape = load_tokenizer(config.base, config.revision), load_shape(config.base, config.revision)
        examples, account = load_examples(config, tokenizer, split)
        chosen = [e for e in examples if e.id in conversations][:notes]  # the --reference column may lack some
        ids, ranks = [e.id for e in chosen], init_distributed(config.run.join_minutes)
        seed_everything(config.seed)
        backend, _ = choose_backend(config.attention, ranks.device, dtype_of(ds), heads_of(shape))
        engine = deepspeed.initialize(model=load_model(config, ds, ranks.device, backend, adapter=adapter), config=ds)[0]
        rows = 1 if config.micro_batch_size == "auto" else config.micro_batch_size
        losses = example_losses(engine, examples, rows * config.max_seq_len, config.max_seq_len, ranks)
        assert losses is not None  # there was nothing that could have asked it to stop
        report |= {"examples": len(examples), "left out": account.rows - account.kept}
        report["figures"]["loss"] = dict(zip(("value", "low", "high"), (ratio(losses), *interval(losses))))
        written = share_notes(engine, tokenizer, chosen, config.monitor.sample_max_new_tokens, ranks)
    if ids:
        scored, figures = score_all([conversations[key] for key in ids], written, train, ranks)
        report |= {"notes": len(ids), "figures": report["figures"] | figures}
        report["unsupported"] = {row.id: found for row in scored if (found := sorted({f"{f.kind}: {f.value}" for f in unsupported(row)}))}
        if html and ranks.is_main:
            write_page(Path(html), f"{split}, {len(ids)} notes", scored, as_table(report["figures"]))
    return report if ranks.is_main else {}


def main(argv: list[str] | None = None) -> None:
    """`evaluate [--adapter DIR] [--split test] [--notes N] [--predictions FILE] [--reference COLUMN] [--html FILE] [--config FILE] [key=value]`"""
    from torch.utils.tensorboard import SummaryWriter
    from .monitor import quiet_libraries

    quiet_libraries()
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if "--canaries" in args:
            from .canaries import main as measure_canaries  # late: it trains, and the loop imports this module

            return measure_canaries(args)
        options = take_options(args, dict.fromkeys(("--adapter", "--notes", "--predictions", "--reference", "--html")) | {"--split": "test"})
        split, notes, predictions = options["--split"], options["--notes"], options["--predictions"]
        if split not in ("train", "valid", "test"):
            raise ConfigError(f"--split {split}: one of train, valid, test")
        if notes is not None and not notes.isdigit():
            raise ConfigError(f"--notes {notes}: must be a whole number")
        config = load_config(args)
        trained = config.folder / ("model" if config.method == "full" else "adapter")
        adapter = options["--adapter"] or (str(trained) if trained.is_dir() and config.method != "full" else None)
        if adapter and config.method == "full":
            raise ConfigError(f"--adapter {adapter}: the configuration says method=full, which has none; leave one of them out")
        if adapter and not predictions:  # the rounding of the base that it was trained on, whatever the configuration says
            config = config.model_copy(update={key: read_adapter(adapter)[key] for key in ("method", "double_quant", "revision")})
            check_adapter(adapter, config.base)
        elif trained.is_dir():
            config = config.model_copy(update={"base": str(trained)})
        count = 0 if config.data.supervise == "all" else notes and int(notes)
        report = evaluate(config, adapter, split, count, predictions, options["--reference"], options["--html"])
    except (ConfigError, AttentionError) as error:
        exit_with_config_error(error)
    except (AuditError, JoinError) as error:
        leave(1, f"error: {error}")
    if report:
        name = f"{split}/{Path(predictions).stem}" if predictions else split
        print(f"{split}, {predictions or adapter or f'{config.base} without an adapter'}: " + ", ".join(
            f"{report[key]:,} {key}" for key in ("examples", "left out", "notes") if key in report) + "\n" + as_table(report["figures"]))  # fmt: skip
        if config.folder.is_dir():
            steps = write_report(config.folder, {f"evaluate/{name}": report}).get("steps", 0)
            with SummaryWriter(str(config.folder / "tensorboard" / "evaluate")) as board:
                for key, figure in report["figures"].items():
                    board.add_scalar(f"{name}/{key}", figure["value"], steps)
            print(f"with every unsupported fact in {config.folder / 'report.json'}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
