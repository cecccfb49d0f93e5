"""How good the model is on a split: token-weighted loss and whether its notes have their four sections."""

import math
import sys

import deepspeed
import torch

from .attention import AttentionError, choose_backend
from .cli import exit_with_config_error, load_config, take_options
from .config import Config, ConfigError
from .data import load_examples
from .distributed import Ranks, init_distributed, seed_everything
from .ds_config import build_ds_config
from .folder import write_report
from .generate import write_notes
from .model import dtype_of, load_model, load_shape, load_tokenizer, read_adapter, summed_cross_entropy
from .packing import collate, cut, make_plan
from .soap import has_all_sections
from .tokens import Example
from .watchdog import doing


@torch.no_grad()
def evaluate_loss(engine, examples: list[Example], capacity: int, max_seq_len: int, ranks: Ranks, stop=None) -> dict[str, float]:
    """Mean cross-entropy over all supervised tokens of `examples`, in nats, and its perplexity.

    A mean of batch means would weigh a short note like a long one and change with the batch size; sums divided once don't.
    capacity: tokens of a micro-batch. Every rank must call it; all get the same figures, and dropout is off meanwhile. With `stop`, a
    StopRequest, it gives up and returns {} when a rank is asked to end."""
    lengths = [len(e) for e in examples]
    was_training = engine.module.training
    engine.module.eval()
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    plan = make_plan(lengths, capacity * ranks.world_size, seed=0)
    for step in range(len(plan)):
        doing(f"evaluating, batch {step + 1} of {len(plan)}")
        if stop and ranks.any(stop.signal is not None):
            engine.module.train(was_training)
            return {}
        for ids in cut(plan[step], lengths, ranks.world_size, capacity)[ranks.rank]:
            batch = collate([examples[i] for i in ids], max_seq_len).to(ranks.device)
            total[0] += summed_cross_entropy(engine.module(**batch.model_inputs()).logits, batch.targets)
            total[1] += (batch.targets != -100).sum()
    engine.module.train(was_training)
    loss_sum, targets = ranks.sum(*total.tolist())
    loss = loss_sum / targets
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700))}


def prompt_of(example: Example):
    """The tokens before the first supervised one."""
    return example.input_ids[: int((example.labels != -100).argmax())]


def sample_notes(engine, tokenizer, examples: list[Example], max_new_tokens: int, ranks: Ranks, stop=None) -> dict[str, str]:
    """Greedy notes of held-out examples by id. All ranks write all of them, in lockstep. With `stop`, a StopRequest, they break off
    when the run is asked to end."""
    if not examples:
        return {}
    prompts = [prompt_of(e).tolist() for e in examples]
    notes = write_notes(engine.module, tokenizer, prompts, max_new_tokens, synced=ranks.world_size > 1, stop=stop)
    return {e.id: note for e, note in zip(examples, notes)}


def evaluate(config: Config, adapter: str | None, split: str, notes: int) -> dict[str, float]:
    """Loads base and adapter under ZeRO-3 as in training and returns the figures of a split."""
    ds = build_ds_config(config)
    tokenizer, shape = load_tokenizer(config.base, config.revision), load_shape(config.base, config.revision)
    examples, account = load_examples(config, tokenizer, split)
    if not examples:
        raise ConfigError(f"data.{split} is not set")
    ranks = init_distributed()
    seed_everything(config.seed)
    backend, _ = choose_backend(config.attention, ranks.device, dtype_of(ds), shape.head_dim)
    model = load_model(config, ds, ranks.device, backend, adapter=adapter)
    engine = deepspeed.initialize(model=model, config=ds)[0]
    rows = 1 if config.micro_batch_size == "auto" else config.micro_batch_size
    figures = evaluate_loss(engine, examples, rows * config.max_seq_len, config.max_seq_len, ranks)
    figures |= {"examples": len(examples), "left out": account.rows - account.kept}
    if notes:
        written: dict[str, str] = {}
        for start in range(0, min(notes, len(examples)), 16):
            batch = examples[start : min(start + 16, notes)]
            written |= sample_notes(engine, tokenizer, batch, config.monitor.sample_max_new_tokens, ranks)
        figures["notes"] = len(written)
        figures["notes with S, O, A, P"] = sum(map(has_all_sections, written.values())) / len(written)
    return figures if ranks.is_main else {}


def main(argv: list[str] | None = None) -> None:
    """`evaluate [--adapter DIR] [--split test] [--notes N] [--config FILE] [key=value ...]`"""
    from .monitor import quiet_libraries

    quiet_libraries()
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if "--canaries" in args:
            from .canaries import main as measure_canaries  # late: it trains, and the loop imports this module

            return measure_canaries(args)
        options = take_options(args, {"--adapter": None, "--split": "test", "--notes": "16"})
        if options["--split"] not in ("train", "valid", "test"):
            raise ConfigError(f"--split {options['--split']}: one of train, valid, test")
        if not options["--notes"].isdigit():
            raise ConfigError(f"--notes {options['--notes']}: must be a whole number")
        config = load_config(args)
        trained = config.folder / ("model" if config.method == "full" else "adapter")
        adapter = options["--adapter"] or (str(trained) if trained.is_dir() and config.method != "full" else None)
        if adapter and config.method == "full":
            raise ConfigError(f"--adapter {adapter}: the configuration says method=full, which has none; leave one of them out")
        if adapter:  # the rounding of the base that it was trained on, whatever the configuration says
            config = config.model_copy(update={key: read_adapter(adapter)[key] for key in ("method", "double_quant", "revision")})
        elif trained.is_dir():
            config = config.model_copy(update={"base": str(trained)})
        figures = evaluate(config, adapter, options["--split"], int(options["--notes"]))
    except (ConfigError, AttentionError) as error:
        exit_with_config_error(error)
    if figures:
        print(f"{options['--split']}, {adapter or f'{config.base} without an adapter'}")
        for name, value in figures.items():
            print(f"  {name:24} {value:,.4f}" if isinstance(value, float) else f"  {name:24} {value:,}")
        if config.folder.is_dir():
            write_report(config.folder, {f"evaluate/{options['--split']}": figures})
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
