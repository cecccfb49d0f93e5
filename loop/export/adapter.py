"""What a run hands out: the adapter in PEFT's own format, or with method=full the model in the hub's layout."""

import json
import shutil
from pathlib import Path

import deepspeed
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..config.schema import Config
from ..data.tokenization import Example
from ..distributed.watchdog import set_activity
from ..distributed.world import Ranks
from ..optim.adamw import trainable_parameters
from .audit import WEIGHTS, AuditError, audit_config, audit_loss, audit_weights, provenance


def export_model(
    engine,
    config: Config,
    tokenizer,
    folder: Path,
    ranks: Ranks,
    sample: list[Example],
    loss: float,
) -> tuple[Path, dict]:
    """Writes what was trained: `adapter/` in PEFT's format, or with method=full `model/` in the hub's layout, each with the tokenizer.
    Every rank must call it: under ZeRO-3 a tensor that is not gathered would be saved empty (trl#4416). It is written aside, audited, and
    renamed, so that nobody finds half of it, or what was not trained: the files are read from disk again, and with a `sample` of examples
    a fresh process must get the run's `loss` on them. Returns the folder, and what audit_loss gave ({} on other ranks than 0). Raises
    on all ranks AuditError when the audit fails, OSError when nothing can be written."""
    set_activity("writing the result")
    engine.empty_partition_cache()  # a GPU may still be prefetching for a step that won't come; what is in flight can't be gathered
    state = gathered_weights(engine.module, ranks)
    target = folder / ("model" if config.method == "full" else "adapter")
    problem, figures = None, {}
    if ranks.is_main:
        aside = folder / f".writing-{target.name}"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            tokenizer.save_pretrained(aside)
            write_model(engine.module, state, config, aside)
            if sample:
                set_activity("waiting for the loss of a fresh process")
                if ranks.device.type == "cuda":
                    torch.cuda.empty_cache()
                figures = audit_loss(
                    aside, sample, loss, ranks.device, timeout=30 * config.run.stall_timeout_minutes
                )
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
        except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
            problem = [
                "",
                f"{target} cannot be written: {error}. The run's last checkpoint stays; the same command writes it again",
            ]
        except AuditError as error:
            problem = [
                "audit",
                f"the audit of what was to become {target} failed: {error}. It lies in {aside}; the run's last checkpoint "
                "stays, and the same command writes it again",
            ]
    if problem := ranks.all_gather_json(problem)[
        0
    ]:  # on all ranks alike, or some would wait for the others
        raise (AuditError if problem[0] else OSError)(problem[1])
    return target, figures


def gathered_weights(model, ranks: Ranks) -> dict[str, torch.Tensor]:
    """All trained weights, whole, in the engine's dtype, on rank 0's CPU; {} on the other ranks. Every rank must call it."""
    state = {}
    for name, p in trainable_parameters(model):
        with deepspeed.zero.GatheredParameters([p]):
            whole = p.ds_shape  # type: ignore[attr-defined]  # which ZeRO-3 gives each
            if p.shape != whole:
                raise RuntimeError(
                    f"{name} has the shape {tuple(p.shape)} after gathering, not {tuple(whole)}; nothing was written"
                )
            if ranks.is_main:
                state[name] = p.detach().cpu().clone().contiguous()
    return state


def write_model(model, state: dict[str, torch.Tensor], config: Config, folder: Path) -> None:
    """Writes gathered weights and holds what is on the disk then against them. Raises AuditError."""
    if not isinstance(model, PeftModel):
        for a, b in getattr(model, "all_tied_weights_keys", {}).items():
            state.setdefault(a, state[b]) if b in state else state.setdefault(b, state[a])
        model.save_pretrained(folder, state_dict=state)
        return audit_weights(folder, state)
    tensors = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    if len(tensors) != len(state):
        raise AuditError(f"PEFT keeps {len(tensors)} of the {len(state)} trained tensors")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    peft_config = model.peft_config["default"]
    peft_config.inference_mode, peft_config.revision = True, config.revision
    peft_config.save_pretrained(str(folder))
    trained = provenance(config, next(iter(state.values())).dtype, folder / WEIGHTS)
    (folder / "trained.json").write_text(json.dumps(trained, indent=1))
    audit_weights(folder, tensors)
    audit_config(folder, config, peft_config)
