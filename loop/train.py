"""The training loop, top to bottom: QLoRA under DeepSpeed ZeRO-3 on packed rows. Read `main`, then `train_step`."""

import math
import sys
import time

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from .attention import AttentionError, choose_backend
from .checkpoint import Checkpoints, export_model
from .config import Config, ConfigError, exit_with_config_error, load_config
from .data import Example, load_examples
from .distributed import Ranks, StopRequest, init_distributed, seed_everything
from .ds_config import build_ds_config
from .evaluate import evaluate_loss, sample_notes
from .model import (
    choose_micro_batch, dtype_of, load_model, load_shape, load_tokenizer, summed_cross_entropy, trainable, use_checkpointing,
)  # fmt: skip
from .monitor import Monitor, describe_plan, quiet_libraries, versions
from .optim import adamw, clip_grad_norm, cosine_lr, set_lr
from .packing import Batch, collate, cut, make_plan


def train_step(engine, parameters: list, micro_batches: list[Batch], num_targets: int, max_grad_norm: float, ranks: Ranks):
    """One optimizer step on this rank's micro-batches. num_targets: supervised tokens of the whole step, over all ranks.

    Returns (this rank's summed loss in nats as a float64 tensor, global gradient norm before clipping)."""
    loss_total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for i, batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        # ZeRO-3 may update the weights only after the last micro-batch. We say which one that is: their number varies.
        engine.set_gradient_accumulation_boundary(last)
        batch = batch.to(ranks.device)
        logits = engine(**batch.model_inputs()).logits  # [1, N, V], N supervised positions
        loss_sum = summed_cross_entropy(logits, batch.targets)
        # Every supervised token of the step weighs the same, so divide once by all of them: not by the micro-batch's own
        # number (a short note would weigh as much as a long one), and not by the number of micro-batches, which is what
        # scale_wrt_gas would do. DeepSpeed averages gradients over ranks; world_size turns that average back into a sum.
        engine.backward(loss_sum * (ranks.world_size / num_targets), scale_wrt_gas=False)
        loss_total += loss_sum.detach()
        if last:
            # The accumulated gradients are complete now and engine.step() will consume them: the only moment to clip.
            grad_norm = clip_grad_norm(parameters, max_grad_norm)
        engine.step()  # does nothing before the boundary; skips a non-finite gradient on all ranks alike
    return loss_total, grad_norm


def fingerprint(examples: list[Example]) -> str:
    """A hash of what is trained on, after tokenising: other data, template or tokenizer give another one."""
    import hashlib

    digest = hashlib.sha256()
    for e in examples:
        digest.update(e.id.encode() + e.input_ids.tobytes() + e.labels.tobytes())
    return digest.hexdigest()[:16]


def free_gpu_bytes(ranks: Ranks) -> int | None:
    """Free memory of the fullest GPU of the run, None on CPUs."""
    if ranks.device.type == "cpu":
        return None
    free = torch.tensor(torch.cuda.mem_get_info()[0], device=ranks.device)
    dist.all_reduce(free, op=dist.ReduceOp.MIN)  # all ranks must come to the same cut
    return int(free)


def train(config: Config, ds: dict) -> dict:
    """Runs the whole job and returns the figures of report.json."""
    stop = StopRequest()
    tokenizer, shape = load_tokenizer(config.base, config.revision), load_shape(config.base, config.revision)
    examples, dropped = load_examples(config, tokenizer, "train")
    held_out, held_out_dropped = load_examples(config, tokenizer, "valid")
    shown = [e for e in held_out if e.id in config.monitor.sample_notes]
    if missing := set(config.monitor.sample_notes) - {e.id for e in shown}:
        raise ConfigError(f"monitor.sample_notes: {sorted(missing)[0]} is not an id of data.valid, or is longer than max_seq_len")
    lengths = np.array([len(e) for e in examples])
    targets = np.array([e.num_targets for e in examples])
    plan = make_plan(lengths, config.tokens_per_step, config.seed, config.epochs, config.max_steps)

    ranks = init_distributed()
    backend, attention_remark = choose_backend(config.attention, ranks.device, dtype_of(ds), shape.head_dim)
    seed_everything(config.seed)  # equal on all ranks: they share LoRA's random initial weights by halves
    model = load_model(config, ds, ranks.device, backend)
    micro_batch_size, checkpointing = choose_micro_batch(config, shape, ranks.world_size, free_gpu_bytes(ranks))
    capacity = micro_batch_size * config.max_seq_len
    use_checkpointing(model, checkpointing)
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=adamw(model, config), config=ds)
    parameters = [p for _, p in trainable(engine.module)]
    seed_everything(config.seed + 1 + ranks.rank)  # different from here on: each rank drops out other units

    identity = {"base": config.base, "method": config.method, "lora": config.lora, "examples": fingerprint(examples), "seed": config.seed,
                "batch_size": config.batch_size, "max_seq_len": config.max_seq_len, "epochs": config.epochs}  # fmt: skip
    checkpoints = Checkpoints(config.folder, ranks, config.run.keep_checkpoints)
    path, manifest, remarks = checkpoints.newest() if config.run.resume else (None, {}, [])
    first_step = checkpoints.load(engine, path, manifest, identity) if path else 0

    monitor = Monitor(config, ds, ranks, first_step, len(plan))
    monitor.say(f"machine     {ranks.world_size} rank(s) on {versions()['device']}, ZeRO-3; {attention_remark.split(';')[0]}; "
                f"gradient checkpointing {'on' if checkpointing else 'off'}\n"
                f"base        {config.base}: {config.method}, {sum(p.ds_numel for p in parameters):,} trainable parameters\n"
                f"examples    {len(examples):,} to train on ({len(dropped)} dropped as longer than {config.max_seq_len:,} tokens), "
                f"{len(held_out):,} held out ({len(held_out_dropped)} dropped)\n"
                + describe_plan(plan, lengths, targets, config, ranks.world_size, micro_batch_size))  # fmt: skip
    if dropped:
        monitor.say(f"dropped     {', '.join(dropped[:8])}{' ...' if len(dropped) > 8 else ''}")
    for remark in [*remarks, f"resumed from {path}" if path else f"run folder  {config.folder}"]:
        monitor.say(remark)

    def validate_and_show(step: int) -> dict[str, float]:
        figures = evaluate_loss(engine, held_out, capacity, config.max_seq_len, ranks) if held_out else {}
        monitor.scalars(step, figures)
        monitor.notes(step, sample_notes(engine, tokenizer, shown, config.monitor.sample_max_new_tokens, ranks))
        if figures:
            monitor.say(f"step {step}: validation loss {figures['eval/loss']:.4f}, perplexity {figures['eval/perplexity']:.2f}")
        return figures

    figures = validate_and_show(0) if first_step == 0 else {}
    history, bad_steps, tokens_done, started = [], 0, 0, time.perf_counter()
    monitor.exclude()
    for step in range(first_step, len(plan)):
        ids = plan[step]
        mine = cut(ids, lengths, ranks.world_size, capacity)[ranks.rank]
        micro_batches = [collate([examples[i] for i in part], config.max_seq_len) for part in mine]
        num_targets = int(targets[ids].sum())
        lr = cosine_lr(step, len(plan), config.lr, warmup_steps=config.warmup_steps, min_lr=config.min_lr,
                       restart_steps=config.restart_steps, restart_mult=config.restart_mult)  # fmt: skip
        set_lr(optimizer, lr)

        loss_sum, grad_norm = train_step(engine, parameters, micro_batches, num_targets, config.max_grad_norm, ranks)

        loss_sum, stopping = ranks.sum(loss_sum.item(), stop.signal is not None)
        loss = loss_sum / num_targets
        monitor.step(step + 1, loss, grad_norm, lr, int(lengths[ids].sum()))
        history.append(loss)
        tokens_done += int(lengths[ids].sum())
        if engine.was_step_applied():
            bad_steps = 0
        else:
            bad_steps += 1
            monitor.say(f"step {step + 1}: gradient norm {grad_norm}, the step was skipped on all ranks; "
                        f"examples {', '.join(examples[i].id for i in ids)}")  # fmt: skip
        give_up = bad_steps >= config.run.bad_steps
        done = step + 1 == len(plan)
        if done or (step + 1) % config.monitor.eval_steps == 0:
            figures = validate_and_show(step + 1)
        if done or stopping or give_up or (step + 1) % config.run.save_steps == 0:
            if problem := checkpoints.save(engine, step + 1, identity):
                monitor.say(problem)
        if give_up:
            raise FloatingPointError(f"{bad_steps} steps in a row had a non-finite gradient; the state of step {step + 1} is saved in "
                                     f"{checkpoints.folder}. Look at the examples named above, or lower lr")  # fmt: skip
        if stopping:
            monitor.say(f"asked to stop: saved after step {step + 1}; the same command goes on from here")
            break
        monitor.exclude()

    seconds = time.perf_counter() - started
    exported = export_model(engine, config, tokenizer, config.folder, ranks)
    report = {"steps": first_step + len(history), "planned_steps": len(plan), "train/loss_first": history[0] if history else math.nan,
              "train/loss_last": history[-1] if history else math.nan, **figures, "train/tokens_per_second": tokens_done / seconds,
              "fill": plan.fill, "exported": str(exported)}  # fmt: skip
    monitor.close(report)
    return report


def show_summary(config: Config, report: dict) -> None:
    """What the run came to, the sample notes before and after it, and where to look further."""
    samples = sorted((config.folder / "samples").glob("step-*.md"))
    if len(samples) > 1:
        print(f"\n--- before training ({samples[0]}) ---\n{samples[0].read_text()}\n--- after ({samples[-1]}) ---\n{samples[-1].read_text()}")
    option = "--base" if config.method == "full" else "--adapter"
    evaluated = f", validation loss {report['eval/loss']:.4f}" if "eval/loss" in report else ""
    print(f"\n{report['steps']} of {report['planned_steps']} steps: training loss {report['train/loss_first']:.4f} -> "
          f"{report['train/loss_last']:.4f}{evaluated}, {report['train/tokens_per_second']:,.0f} tokens/s\n"
          f"  written to        {report['exported']}\n"
          f"  look at curves    tensorboard --logdir {config.run.dir}\n"
          f"  write a note      ./launch.sh generate {option} {report['exported']} --dialogue FILE\n"
          f"  score it          ./launch.sh evaluate --config {config.folder}/config.yaml")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    quiet_libraries()
    try:
        config = load_config(sys.argv[1:] if argv is None else argv)
        report = train(config, build_ds_config(config))
    except (ConfigError, AttentionError, FloatingPointError) as error:
        exit_with_config_error(error)
    if int(torch.distributed.get_rank()) == 0:
        show_summary(config, report)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
