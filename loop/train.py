"""The training loop: QLoRA under DeepSpeed ZeRO-3 on packed rows. Read `train_step`, then `_train` from top to bottom."""

import contextlib
import math
import runpy
import time
from collections import deque

import deepspeed
import numpy as np
import torch

from .checkpoint.checkpointer import Checkpointer
from .checkpoint.identity import at_step, check_compatible, check_equal_on_all_ranks, run_identity
from .checkpoint.run_dir import open_run_dir, versions
from .config.schema import Config, ConfigError
from .data.batch_plan import plan_batches, split_step
from .data.collate import PackedBatch, collate
from .data.dataset import load_examples, weights_of
from .distributed.seeding import seed_everything, use_deterministic_kernels
from .distributed.stop import StopRequest
from .distributed.watchdog import Watchdog, set_activity
from .distributed.world import Ranks, init_distributed
from .evaluation.loss import evaluate_loss
from .export.adapter import export_model
from .export.audit import describe_audit
from .generation.sharded import generate_sharded, prompt_of
from .memory.measure import PeakMemory
from .model.build import build_model
from .model.flops import attention_pair_cost
from .model.loading import load_model_config, load_tokenizer
from .model.loss import summed_cross_entropy
from .model.replay import release_graphs, replay_layers
from .monitor.mfu import utilisation
from .monitor.run_logger import RunLogger
from .optim.adamw import build_optimizer, trainable_parameters
from .optim.schedule import cosine_lr, set_lr
from .optim.skip import loss_spike_threshold
from .zero3.gradients import clip_grad_norm, invalidate_gradients
from .zero3.optimizer_state import adam_step
from .zero3.replicated import spare


def train_step(
    engine,
    parameters: list,
    micro_batches: list[PackedBatch],
    num_targets: int,
    max_grad_norm: float,
    ranks: Ranks,
    draw_mask=None,
    loss_limit: float = math.inf,
    mark=lambda part: None,
):
    """One optimizer step on this rank's micro-batches. num_targets: supervised tokens of the whole step, over all ranks. draw_mask:
    draws the dropout of the micro-batch with this index; loss_limit: of the step's loss, above it the update is skipped; mark: is told
    which part of the step begins (timers.py).

    Returns (the step's loss over all ranks in nats a supervised token, global gradient norm before clipping, which of this rank's
    micro-batches had a loss that is no number)."""
    losses = []  # of each micro-batch, summed over its supervised tokens
    for i, batch in enumerate(micro_batches):
        set_activity(f"micro-batch {i + 1} of {len(micro_batches)}")
        mark("forward")
        last = i == len(micro_batches) - 1
        # ZeRO-3 may update the weights only after the last micro-batch. We say which one that is: their number varies.
        engine.set_gradient_accumulation_boundary(last)
        if draw_mask:
            draw_mask(i)
        batch = batch.to(ranks.device)
        logits = engine(**batch.model_inputs()).logits  # [1, N, V], N supervised positions
        loss_sum = summed_cross_entropy(logits, batch.targets)
        mark("backward")
        # Every supervised token of the step weighs the same, so divide once by all of them: not by the micro-batch's own
        # number (a short note would weigh as much as a long one), and not by the number of micro-batches, which is what
        # scale_wrt_gas would do. DeepSpeed averages gradients over ranks; world_size turns that average back into a sum.
        engine.backward(loss_sum * (ranks.world_size / num_targets), scale_wrt_gas=False)
        losses.append(loss_sum.detach().double())
        if last:
            set_activity("clipping and updating")
            mark("optimizer")
            # The accumulated gradients are complete now and engine.step() will consume them: the only moment to clip.
            grad_norm = clip_grad_norm(parameters, max_grad_norm)
            loss = ranks.all_reduce_sum(torch.stack(losses).sum()) / num_targets
            if loss_limit < math.inf:
                invalidate_gradients(parameters, loss > loss_limit)
        # Does nothing before the boundary. The update is skipped, on all ranks alike and without a word, when the gradient is
        # not finite; `engine.was_step_applied()` tells, and the caller says it aloud.
        engine.step()
    # All figures in one transfer, after the update: reading one earlier would keep the GPU waiting for what comes next.
    loss, grad_norm, *losses = torch.stack([loss, grad_norm, *losses]).tolist()
    return loss, grad_norm, [i for i, value in enumerate(losses) if not math.isfinite(value)]


def train(config: Config, ds: dict, make_monitor: type[RunLogger] = RunLogger) -> dict:
    """Runs the whole job and returns the figures of report.json (on rank 0)."""
    with (
        contextlib.ExitStack() as held
    ):  # the folder's lock and the watchdog, let go however the run ends
        return _train(config, ds, held, make_monitor)


def _train(
    config: Config, ds: dict, held: contextlib.ExitStack, make_monitor: type[RunLogger]
) -> dict:
    stop = StopRequest(config.run.max_hours)
    tokenizer, shape = (
        load_tokenizer(config.base, config.revision),
        load_model_config(config.base, config.revision),
    )
    examples, account = load_examples(config, tokenizer, "train")
    held_out, held_out_account = load_examples(config, tokenizer, "valid")
    shown = [e for e in held_out if e.id in config.monitor.sample_notes]
    if missing := set(config.monitor.sample_notes) - {e.id for e in shown}:
        raise ConfigError(
            f"monitor.sample_notes: {sorted(missing)[0]} is not an id of data.valid, or is longer than max_seq_len"
        )
    lengths = np.array([len(e) for e in examples])
    targets = np.array([e.num_targets for e in examples])
    plan = plan_batches(
        lengths,
        config.tokens_per_step,
        config.seed,
        config.epochs,
        config.max_steps,
        weights_of(examples),
    )
    if config.warmup_steps >= len(plan):
        raise ConfigError(
            f"warmup_steps={config.warmup_steps}: the whole run has {len(plan)} steps; lr would never be reached"
        )

    identity, made_by = run_identity(config, tokenizer, examples, plan), versions()
    ranks = init_distributed(
        config.run.rendezvous_timeout_minutes, 3 * config.run.stall_timeout_minutes, stop
    )  # the watchdog is to speak first
    check_equal_on_all_ranks(ranks, identity, made_by)
    measured = PeakMemory(ranks.device)
    use_deterministic_kernels(config.run.deterministic)
    held.enter_context(open_run_dir(config, ranks))
    checkpoints = Checkpointer(config.folder, ranks, config.run.keep_checkpoints)
    path, manifest, remarks = checkpoints.agree_on_newest()
    # figures: of the validation after a step; {}: none was due; None: it was broken off, so who resumes does it again.
    first_step, figures = manifest.get("step", 0), manifest.get("figures")
    skipped, recent = (
        manifest.get("skipped", 0),
        deque(manifest.get("recent_losses", []), maxlen=50),
    )
    if path:
        remarks += check_compatible(
            path, manifest["identity"], identity, plan, first_step, config.run.resume == "force"
        )

    model, chosen = build_model(config, ds, shape, float(targets.sum() / lengths.sum()), ranks)
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, optimizer=build_optimizer(model, config), config=chosen.ds
    )
    engine.train()  # from_pretrained leaves the base's modules in evaluation mode, without dropout
    parameters: list = [p for _, p in trainable_parameters(engine.module)]
    seed_everything(
        config.seed + 1 + ranks.rank
    )  # LoRA's dropout has its own seeds; whatever else may draw, draws anew on each rank
    if path:
        checkpoints.load(engine, path, manifest)
    spare(engine, chosen.whole, ranks)  # of ZeRO-3's hooks, where they have nothing to do
    row, room, launched = (
        chosen.capacity,
        None,
        "",
    )  # tokens of a micro-batch; (tokens, documents) that recorded layers need; why there are none
    if chosen.replayed:
        row, room, launched = replay_layers(
            config, engine.module, plan, lengths, chosen.capacity, chosen.dropout, ranks
        )

    held.enter_context(
        Watchdog(
            config.folder,
            ranks,
            config.run.stall_timeout_minutes,
            config.run.heartbeat_timeout_minutes,
        )
    )
    mfu = utilisation(engine.module, shape, ranks)
    # Ranks wait for each other: attention counts where they have rows of their own sizes. Rows that are filled up should be short instead.
    pairs = attention_pair_cost(engine.module, shape) if ranks.world_size > 1 and not room else 0.0
    monitor = make_monitor(
        config, chosen.ds, engine, ranks, first_step, len(plan), mfu, evaluated=figures is not None
    )
    monitor.say(
        f"machine     {ranks.world_size} rank(s) on {made_by['device']}, {chosen.described}\n"
        f"base        {config.base}: {config.method}, {sum(p.ds_numel for p in parameters):,} trainable parameters\n"
        f"examples    {len(examples):,} of {account.rows:,} to train on, {len(held_out):,} of {held_out_account.rows:,} held out"
    )
    monitor.accounts({"train": account, "valid": held_out_account})
    monitor.plan(
        plan,
        examples,
        chosen.capacity // config.max_seq_len,
        split_step(plan[0], lengths, ranks.world_size, row, pairs),
    )
    remarks += [
        *chosen.remarks,
        *ranks.all_gather_json(launched),
        f"resumed from {path}" if path else f"run folder  {config.folder}",
    ]
    for remark in filter(None, remarks):
        monitor.say(remark)

    monitor.prompts(
        {e.id: tokenizer.decode(prompt_of(e), skip_special_tokens=True).strip() for e in shown}
    )

    def validate_and_show(step: int) -> dict[str, float] | None:
        """Validation loss and sample notes after `step` steps. None, and nothing is logged, when the run is asked to stop meanwhile: the
        resumed run repeats it."""
        if not held_out:
            return {}
        figures = evaluate_loss(engine, held_out, chosen.capacity, config.max_seq_len, ranks, stop)
        share = -(-len(shown) // ranks.world_size)  # a few notes: each rank writes some
        notes = generate_sharded(
            engine, tokenizer, shown, config.monitor.sample_max_new_tokens, ranks, stop, share
        )
        if ranks.any(stop.requested):
            return None
        monitor.scalars(step, figures)
        monitor.say(
            f"step {step}: validation loss {figures['eval/loss']:.4f}, perplexity {figures['eval/perplexity']:.2f}"
        )
        monitor.notes(step, {key: note.text for key, note in notes.items()})
        return figures

    def save(step: int, figures: dict[str, float] | None) -> None:
        """The state after `step` steps. What was logged up to it is made safe first, so that the curve has no gap after a resume."""
        started = time.perf_counter()
        monitor.flush()
        problem = checkpoints.save(
            engine,
            step,
            {
                "identity": at_step(identity, plan, step),
                "config": config.model_dump(mode="json"),
                "versions": made_by,
                "figures": figures,
                "skipped": skipped,
                "recent_losses": list(recent),
            },
        )
        monitor.say(problem) if problem else monitor.scalars(
            step, {"train/save_seconds": time.perf_counter() - started}
        )

    # A first start: what all later figures are compared with. A resume: the validation that the earlier run broke off.
    if figures is None:
        figures = validate_and_show(first_step)
    stopping, max_skipped_in_a_row, fullest = (
        figures is None,
        0,
        0,
    )  # fullest: tokens of this rank's largest micro-batch so far
    for step in range(first_step, len(plan)):
        if stopping:  # in the evaluation just now; nothing new is to be saved
            break
        set_activity("reading and packing examples", step + 1)
        if step == first_step:
            measured.begin()
        monitor.start_step()
        ids = plan[step]  # the examples of this step
        mine = split_step(ids, lengths, ranks.world_size, row, pairs)[
            ranks.rank
        ]  # ids for each of this rank's micro-batches
        micro_batches = [
            collate([examples[i] for i in part], config.max_seq_len, room) for part in mine
        ]
        fullest = max(fullest, *(batch.input_ids.numel() for batch in micro_batches))
        num_targets = int(targets[ids].sum())
        lr = cosine_lr(
            step,
            len(plan),
            config.lr,
            warmup_steps=config.warmup_steps,
            min_lr=config.min_lr,
            restart_steps=config.restart_steps,
            restart_mult=config.restart_mult,
        )
        set_lr(optimizer, lr)

        loss, grad_norm, bad_batches = train_step(
            engine,
            parameters,
            micro_batches,
            num_targets,
            config.max_grad_norm,
            ranks,
            lambda i: chosen.dropout.draw(step, mine[i], micro_batches[i].cu_seqlens),
            loss_spike_threshold(recent, config.run.skip_loss_sigmas),
            monitor.timer.phase,
        )

        set_activity("agreeing whether to stop")
        monitor.timer.phase("agreement")
        stopping = ranks.any(
            stop.requested
        )  # on all ranks alike, or some would wait for the others for ever
        monitor.step(step + 1, loss, grad_norm, lr, lengths[ids], num_targets)
        if step == min(first_step + 2, len(plan) - 1):
            monitor.say(measured.beside(chosen.predicted(fullest)))
        if engine.was_step_applied():
            max_skipped_in_a_row = 0
            recent.append(loss)
        else:
            max_skipped_in_a_row, skipped = max_skipped_in_a_row + 1, skipped + 1
            monitor.scalars(step + 1, {"train/skipped_steps": skipped})
            named = sum(
                ranks.all_gather_json([examples[i].id for at in bad_batches for i in mine[at]]), []
            ) or [examples[i].id for i in ids]
            monitor.say(
                f"step {step + 1}: loss {loss:.4f}, gradient norm {grad_norm:.4f}, the step was skipped on all ranks; "
                f"examples {', '.join(named)}"
            )
        give_up = max_skipped_in_a_row >= config.run.max_skipped_in_a_row
        done = step + 1 == len(plan)
        figures = {}
        if done or (step + 1) % config.monitor.eval_steps == 0:
            figures = validate_and_show(step + 1) if not (stopping or give_up) else None
            stopping = stopping or figures is None
        if done or stopping or give_up or (step + 1) % config.run.save_steps == 0:
            save(step + 1, figures)
        if give_up:
            break

    if max_skipped_in_a_row >= config.run.max_skipped_in_a_row:
        monitor.close({})
        raise FloatingPointError(
            f"{max_skipped_in_a_row} steps in a row were skipped; the state of step {step + 1} is saved in "
            f"{checkpoints.folder}. Look at the examples named above, or lower lr"
        )
    exported = {}
    release_graphs(engine.module)  # the export's fresh process needs room
    if adam_step(engine):  # otherwise the adapter is still the random one from the start
        sample = (
            [] if stopping else (held_out or examples)[: config.run.export_check_examples]
        )  # who is asked to stop has no time for the loss
        loss = (
            evaluate_loss(engine, sample, chosen.capacity, config.max_seq_len, ranks)["eval/loss"]
            if sample
            else 0.0
        )
        folder, audit = export_model(engine, config, tokenizer, config.folder, ranks, sample, loss)
        exported = {
            "exported": str(folder),
            "audit": audit and audit | {"split": "valid" if held_out else "train"},
        }
        monitor.say(describe_audit(audit))
    else:
        monitor.say("no adapter  no step has changed a weight, so there is nothing to hand out")
    report = monitor.close({"fill": plan.fill} | exported | (figures or {}))
    if report and report["steps"] < len(plan):
        at = f"saved after step {report['steps']}" if report["steps"] else "before the first step"
        monitor.say(
            f"asked to stop ({stop.reason or 'another rank was'}): {at}; the same command goes on from there (with run.resume=true)"
        )
    return report


if __name__ == "__main__":  # `python -m loop.train`
    runpy.run_module("loop.commands.train", run_name="__main__", alter_sys=True)
