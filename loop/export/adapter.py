"""What a run exports: an adapter in PEFT's own format, or with method=full a model folder."""

import json
import math
import shutil
import time
from collections import deque
from pathlib import Path

import deepspeed
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..checkpoint.train_state import TrainState
from ..config.error_text import first_line
from ..config.schema import Config
from ..data.batch_plan import BatchPlan, PackingSpec
from ..data.dataset import TrainingData
from ..data.tokenization import Example
from ..distributed.timeline import timed
from ..distributed.watchdog import set_activity
from ..distributed.world import Ranks
from ..evaluation.loss import evaluate_loss
from ..generation.engine_choice import drop_writer_cache
from ..model.build import Execution
from ..model.replay import release_graphs
from ..optim.adamw import trainable_parameters
from ..zero3.optimizer_state import adam_step
from .audit import (
    WEIGHTS,
    AuditError,
    audit_config,
    audit_loss,
    audit_weights,
    describe_audit,
    provenance,
    start_standalone_process,
    stop_standalone_process,
)
from .card import TRAINED, describe_run, write_papers

IMPORT_SECONDS = 20  # of the audit's process, and what it has in reserve

_steps_ended: deque[float] = deque(maxlen=4)  # when, of the last ones


def prepare_audit(config: Config, ranks: Ranks, steps_left: int) -> None:
    """Starts the audit's process while the last steps and the last validation run.

    To be called after each step. The process imports its libraries until then, for some seconds.
    """
    _steps_ended.append(time.monotonic())
    ends = list(_steps_ended)
    step_seconds = min((b - a for a, b in zip(ends, ends[1:])), default=math.inf)
    near = steps_left == 0 or steps_left * step_seconds <= IMPORT_SECONDS
    if near and ranks.is_main and config.run.export != "none" and config.run.export_check_examples:
        start_standalone_process()


@timed("export")
def export_result(
    engine,
    config: Config,
    tokenizer,
    data: TrainingData,
    plan: BatchPlan,
    execution: Execution,
    state: TrainState,
    stopping: bool,
    logger,
) -> dict:
    """Exports what a finished or interrupted run has trained, audits it, and says so.

    Returns {"exported": folder, "audit": result of the audit} for the run's report; {} when no step
    has changed a weight. Every rank must call it. Raises what `export_model` raises.

    Args:
        state: of the run; it tells the step whose weights the engine holds.
        stopping: the run was asked to stop, so there is no time to measure the loss.
        logger: the run's RunLogger.
    """
    ranks = logger.ranks
    release_graphs(engine.module)  # the audit's process needs their memory
    drop_writer_cache(engine.module)
    if config.run.export == "none":
        return {}
    if not adam_step(engine):  # the adapter is still the random one from the start
        logger.say("no adapter  no step has changed a weight, so there is nothing to hand out")
        return {}
    sample = []
    if stopping:
        stop_standalone_process()
    else:
        sample = (data.valid or data.train)[: config.run.export_check_examples]
    loss = 0.0
    if sample:
        packing = PackingSpec(execution.max_tokens, config.max_seq_len)
        loss = evaluate_loss(engine, sample, packing, ranks)["eval/loss"]
    step = state.step if state.exported_step is None else state.exported_step
    facts = describe_run(config, data, plan, step) if ranks.is_main else {}
    folder, audit = export_model(engine, config, tokenizer, facts, ranks, sample, loss)
    logger.say(describe_audit(audit))
    if audit:
        audit = audit | {"split": "valid" if data.valid else "train"}
    return {"exported": str(folder), "audit": audit}


def export_model(
    engine,
    config: Config,
    tokenizer,
    facts: dict,
    ranks: Ranks,
    sample: list[Example],
    loss: float,
) -> tuple[Path, dict]:
    """Writes what was trained: `adapter/` in PEFT's format; with method=full the hub's `model/`.

    Both come with tokenizer and model card. Every rank must call it: under ZeRO-3 a tensor that is
    not gathered would be saved empty (DeepSpeed#7900).

    The files are written to a temporary folder, audited, and renamed. The audit reads them from
    disk again, and with a `sample` of examples a standalone process must get the `loss` on them.

    Returns (the folder, the result of `audit_loss`); the result is {} on other ranks than 0.
    Raises on all ranks AuditError when the audit fails, OSError when nothing can be written.

    Args:
        facts: of `describe_run`, for trained.json and the card.
        sample: examples for the audit's loss; []: only the files are audited.
        loss: the trained weights' loss on `sample`, in nats per supervised token.
    """
    set_activity("writing the result")
    # A GPU may still prefetch for a step that won't come. What is in flight can't be gathered.
    engine.empty_partition_cache()
    state = gather_trained_weights(engine.module, ranks)
    target = config.folder / ("model" if config.method == "full" else "adapter")
    audit: dict = {}
    write_error = audit_error = None
    if ranks.is_main:
        temporary = config.folder / f".writing-{target.name}"
        try:
            audit = write_and_audit(
                engine.module, state, tokenizer, config, temporary, sample, loss, ranks.device
            )
            trained = provenance_of(temporary, config, next(iter(state.values())).dtype)
            write_papers(temporary, trained | facts)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
            write_error = (
                f"{target} cannot be written: {error}. The run's last checkpoint stays; the same "
                "command writes it again"
            )
        except AuditError as error:
            audit_error = (
                f"the audit of what was to become {target} failed: {error}. It lies in "
                f"{temporary}; the run's last checkpoint stays, and the same command writes it "
                "again"
            )
    # On all ranks alike, or some would wait for the others.
    write_error, audit_error = ranks.all_gather_json([write_error, audit_error])[0]
    if audit_error:
        raise AuditError(audit_error)
    if write_error:
        raise OSError(write_error)
    return target, audit


def write_and_audit(
    model, state: dict, tokenizer, config: Config, folder: Path, sample, loss: float, device
) -> dict:
    """Writes weights and tokenizer to a new `folder` and audits them. Returns the loss's audit.

    Without a `sample` only the files are audited, and the result is {}. state: of
    `gather_trained_weights`. Raises AuditError, OSError and SafetensorError.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_tokenizer(tokenizer, folder)
    write_model(model, state, config, folder)
    if not sample:
        return {}
    set_activity("waiting for the loss of a fresh process")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    timeout = 30 * config.run.stall_timeout_minutes
    return audit_loss(folder, sample, loss, device, timeout)


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Writes a tokenizer's files. Raises OSError: of a full disk tokenizers makes an Exception."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        raise OSError(f"the tokenizer: {first_line(error)}") from error


def provenance_of(folder: Path, config: Config, dtype: torch.dtype) -> dict:
    """What trained.json says of a written folder: the audited file, or of a full model anew."""
    if (folder / TRAINED).is_file():
        return json.loads((folder / TRAINED).read_text())
    return provenance(config, dtype, None)


def gather_trained_weights(model, ranks: Ranks) -> dict[str, torch.Tensor]:
    """All trained weights, unsharded, in the engine's dtype, on rank 0's CPU; {} on other ranks.

    Every rank must call it. Raises RuntimeError when a weight's gathered shape is not its own.
    """
    state = {}
    for name, p in trainable_parameters(model):
        with deepspeed.zero.GatheredParameters([p]):
            full_shape = p.ds_shape  # type: ignore[attr-defined]  # ZeRO-3 adds it
            if p.shape != full_shape:
                raise RuntimeError(
                    f"{name} has the shape {tuple(p.shape)} after gathering, not "
                    f"{tuple(full_shape)}; nothing was written"
                )
            if ranks.is_main:
                state[name] = p.detach().cpu().clone().contiguous()
    return state


def write_model(model, state: dict[str, torch.Tensor], config: Config, folder: Path) -> None:
    """Writes gathered weights, reads them back and compares. Raises AuditError."""
    if isinstance(model, PeftModel):
        write_adapter(model, state, config, folder)
    else:
        write_full_model(model, state, folder)


def write_full_model(model, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes all weights in the hub's layout and audits them. Raises AuditError."""
    # Tied weights are one parameter, gathered under one of their two names.
    for first, second in getattr(model, "all_tied_weights_keys", {}).items():
        if second in state:
            state.setdefault(first, state[second])
        else:
            state.setdefault(second, state[first])
    model.save_pretrained(folder, state_dict=dict(state))  # it empties the dict
    audit_weights(folder, state)


def write_adapter(
    model: PeftModel, state: dict[str, torch.Tensor], config: Config, folder: Path
) -> None:
    """Writes LoRA's weights, PEFT's configuration and trained.json, and audits all three.

    Raises AuditError.
    """
    tensors = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    if len(tensors) != len(state):
        raise AuditError(f"PEFT keeps {len(tensors)} of the {len(state)} trained tensors")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    peft_config = model.peft_config["default"]
    peft_config.inference_mode = True
    peft_config.revision = config.revision
    peft_config.save_pretrained(str(folder))
    trained = provenance(config, next(iter(state.values())).dtype, folder / WEIGHTS)
    (folder / "trained.json").write_text(json.dumps(trained, indent=1))
    audit_weights(folder, tensors)
    audit_config(folder, config, peft_config)
