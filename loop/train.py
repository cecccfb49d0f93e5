"""The training loop: QLoRA under DeepSpeed ZeRO-3 on packed sequences.

Read `train_step`, then `train`.
"""

import contextlib
import math
import runpy
from typing import NamedTuple

import deepspeed
import torch

from .checkpoint.checkpointer import Checkpointer
from .checkpoint.identity import RunIdentity
from .checkpoint.run_dir import open_run_dir
from .config.schema import Config
from .data.batch_plan import plan_run, split_step
from .data.collate import PackedBatch, collate
from .data.dataset import TrainingData, load_training_data
from .distributed.seeding import seed_everything, use_deterministic_kernels
from .distributed.stop import StopRequest
from .distributed.timeline import timed
from .distributed.watchdog import Watchdog, set_activity
from .distributed.world import Ranks, init_distributed
from .evaluation.validator import Validator
from .export.adapter import export_result, prepare_audit
from .families.admission import admit_base, check_vocabulary
from .memory.estimate import LOSS_CHUNK
from .memory.measure import PeakMemory
from .model.build import build_model
from .model.engine import prepare_engine
from .model.loss import summed_cross_entropy
from .model.quantization import compute_dtype
from .monitor.run_logger import RunLogger
from .optim.adamw import build_optimizer, trainable_parameters
from .optim.schedule import build_lr_schedule, set_lr
from .zero3.gradients import clip_grad_norm, invalidate_gradients
from .zero3.initialization import lean_initialization


class TrainingDiverged(FloatingPointError):
    """Too many steps in a row were skipped. The state is saved; exit code 1."""


class StepResult(NamedTuple):
    loss: float  # nats per supervised token, over all ranks
    grad_norm: float  # global L2 norm before clipping
    nonfinite: list[int]  # this rank's micro-batches whose loss is NaN or inf


def train_step(
    engine,
    parameters: list,
    micro_batches: list[PackedBatch],
    num_targets: int,
    max_grad_norm: float,
    ranks: Ranks,
    *,
    draw_dropout=None,
    loss_threshold: float = math.inf,
    loss_chunk: int | None = None,
    phase=lambda name: None,
) -> StepResult:
    """One optimizer step on this rank's micro-batches.

    Args:
        parameters: the trainable ones of a ZeRO-3 engine.
        num_targets: supervised tokens of the whole step, over all ranks and micro-batches.
        draw_dropout: called with a micro-batch's index; draws its LoRA dropout masks.
        loss_threshold: the update is skipped when the step's loss is above it (a loss spike).
        loss_chunk: logits that the loss has in fp32 at once; None: all.
        phase: told which part of the step begins: "forward", "backward" or "optimizer".
    """
    losses = []  # of each micro-batch, summed over its supervised tokens
    for i, batch in enumerate(micro_batches):
        set_activity(f"micro-batch {i + 1} of {len(micro_batches)}")
        phase("forward")
        last = i == len(micro_batches) - 1
        # The number of micro-batches varies, so we tell ZeRO-3 which one completes the step.
        engine.set_gradient_accumulation_boundary(last)
        if draw_dropout:
            draw_dropout(i)
        batch = batch.to(ranks.device)
        logits = engine(**batch.model_inputs()).logits  # [1, N, V], N supervised positions
        loss_sum = summed_cross_entropy(logits, batch.targets, loss_chunk)
        phase("backward")
        # Every supervised token of the step has the same weight, so divide once, by all of them:
        # not by the micro-batch's own number (a short note would weigh as much as a long one), and
        # not by the number of micro-batches, as scale_wrt_gas would. DeepSpeed averages gradients
        # over ranks; world_size turns that average back into a sum.
        engine.backward(loss_sum * (ranks.world_size / num_targets), scale_wrt_gas=False)
        losses.append(loss_sum.detach().double())
        if last:
            set_activity("clipping and updating")
            phase("optimizer")
            # The accumulated gradients are complete, and engine.step() consumes them: clip now.
            grad_norm = clip_grad_norm(parameters, max_grad_norm)
            loss = ranks.all_reduce_sum(torch.stack(losses).sum()) / num_targets
            if loss_threshold < math.inf:
                invalidate_gradients(parameters, loss > loss_threshold)
        # Does nothing before the boundary. A non-finite update is skipped on all ranks alike;
        # engine.was_step_applied() tells.
        engine.step()
    # One transfer to the CPU, after the update was launched: reading earlier would stall the GPU.
    loss, grad_norm, *losses = torch.stack([loss, grad_norm, *losses]).tolist()
    return StepResult(loss, grad_norm, [i for i, x in enumerate(losses) if not math.isfinite(x)])


def train(
    config: Config,
    ds_config: dict,
    *,
    data: TrainingData | None = None,
    initialize=timed("engine")(lean_initialization()(deepspeed.initialize)),
    make_logger=RunLogger,
) -> dict:
    """The whole run, from top to bottom. Returns what report.json holds (on rank 0)."""
    with contextlib.ExitStack() as stack:  # unlocks the run directory, stops the watchdog
        # 1. Data, and the plan of all steps: pure functions of the configuration. No GPU yet.
        stop = StopRequest(config.run.max_hours)
        tokenizer, model_config = admit_base(config)
        data = data or timed("data")(load_training_data)(config, tokenizer)
        check_vocabulary(config.base, model_config, data.token_ids())
        examples, lengths, targets = data.train, data.lengths, data.num_targets
        plan = plan_run(config, lengths, data.weights)
        lr_at = build_lr_schedule(config, len(plan))  # a function of the step

        # 2. All ranks, the run directory, and the checkpoint to resume from (step 0 if none).
        identity = RunIdentity.of(config, tokenizer, examples, plan, compute_dtype(ds_config))
        ranks = init_distributed(config.run, stop)
        identity.check_equal_on_all_ranks(ranks)
        memory = PeakMemory(ranks.device)  # before the model: what it takes is measured from here
        use_deterministic_kernels(config.run.deterministic)
        run_dir = stack.enter_context(open_run_dir(config, ranks))
        checkpointer = Checkpointer(run_dir, ranks, config, identity)
        state = checkpointer.find_latest(plan)  # a TrainState

        # 3. A frozen NF4 base with LoRA and its optimizer, both partitioned by ZeRO-3.
        model, execution = build_model(config, ds_config, model_config, data, ranks)
        optimizer = build_optimizer(model, config)
        engine, optimizer, *_ = initialize(
            model=model, optimizer=optimizer, config=execution.ds_config
        )
        engine.train()  # from_pretrained leaves the base in evaluation mode, without dropout
        parameters = [p for _, p in trainable_parameters(engine.module)]
        seed_everything(config.seed + 1 + ranks.rank)  # LoRA's dropout has seeds of its own
        checkpointer.restore(engine)  # weights, optimizer state, generators
        packing, warnings = prepare_engine(
            engine, execution, config, model_config, plan, lengths, ranks
        )

        # 4. Observers: watchdog, logs, validation.
        stack.enter_context(Watchdog(run_dir, ranks, config.run))
        logger = make_logger(config, execution, engine, ranks, state, plan, model_config, memory)
        logger.log_start(data, tokenizer, packing, checkpointer, warnings)
        validator = Validator(config, execution, engine, tokenizer, data, ranks, stop, logger)

        # 5. The loop.
        stopping = state.validation_due and not validator.run(state)  # the baseline
        checkpointer.amend(state, logger)  # where it was a resumed run's last validation
        for step in range(state.step, len(plan)):
            if stopping or state.ended:
                break
            set_activity("reading and packing examples", step + 1)
            logger.start_step(step)
            ids = plan[step]  # the examples of this step, over all ranks
            mine = split_step(ids, lengths, ranks.world_size, packing)[ranks.rank]
            micro_batches = [collate([examples[i] for i in group], packing) for group in mine]
            num_targets = int(targets[ids].sum())
            lr = lr_at(step)
            set_lr(optimizer, lr)
            result = train_step(
                engine, parameters, micro_batches, num_targets, config.max_grad_norm, ranks,
                draw_dropout=lambda i: execution.dropout.draw(
                    step, mine[i], micro_batches[i].cu_seqlens
                ),
                loss_threshold=state.loss_threshold, phase=logger.timer.phase,
                loss_chunk=LOSS_CHUNK if config.chunked_loss else None,
            )  # fmt: skip

            set_activity("agreeing whether to stop")
            logger.timer.phase("sync")
            stopping = ranks.any(stop.requested)  # on all ranks alike, or some would wait for ever
            state.record(result.loss, applied=engine.was_step_applied())  # counts the step
            logger.log_step(state, result, lr, lengths[ids], num_targets, micro_batches)
            if state.last_step_skipped:
                logger.log_skipped_step(state, result, examples, ids, mine)

            prepare_audit(config, ranks, len(plan) - state.step)
            if state.step == len(plan) or state.step % config.monitor.eval_steps == 0:
                stopping |= not validator.run(state, skip=stopping or state.diverged)
            checkpointer.save_if_due(engine, state, stopping, logger)

        # 6. The adapter, checked against the trained weights; the report.
        if state.diverged:
            logger.close({})
            raise TrainingDiverged(checkpointer.diverged_message(state))
        checkpointer.restore_best(engine, state, logger)  # with run.export=best
        exported = export_result(
            engine, config, tokenizer, data, plan, execution, state, stopping, logger
        )
        return logger.finish(state, exported, stop)


if __name__ == "__main__":  # `python -m loop.train`
    runpy.run_module("loop.commands.train", run_name="__main__", alter_sys=True)
