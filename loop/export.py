"""What a run hands out: the adapter in PEFT's own format, or with method=full the model in the hub's layout."""

import json
import shutil
from pathlib import Path

import deepspeed
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file

from .config import Config
from .distributed import Ranks
from .model import trainable
from .watchdog import doing


def export_model(engine, config: Config, tokenizer, folder: Path, ranks: Ranks) -> Path:
    """Writes what was trained: `adapter/` in PEFT's format, or with method=full `model/` in the hub's layout, each with the tokenizer.
    Every rank must call it: under ZeRO-3 a tensor that is not gathered would be saved empty (trl#4416). Returns the folder. It is
    written aside and renamed, so that nobody finds half of it. Raises RuntimeError when a tensor is not whole, OSError on all ranks when
    nothing can be written."""
    doing("writing the result")
    engine.empty_partition_cache()  # a GPU may still be prefetching for a step that won't come; what is in flight can't be gathered
    state = gathered_weights(engine.module, ranks)
    target = folder / ("model" if config.method == "full" else "adapter")
    problem = None
    if ranks.is_main:
        aside = folder / f".writing-{target.name}"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            write_model(engine.module, state, config, aside)
            tokenizer.save_pretrained(aside)
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
        except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
            problem = f"{target} cannot be written: {error}. The run's last checkpoint stays; the same command writes it again"
    if problem := ranks.gather(problem)[0]:  # on all ranks alike, or some would wait for the others
        raise OSError(problem)
    return target


def gathered_weights(model, ranks: Ranks) -> dict[str, torch.Tensor]:
    """All trained weights, whole, in the engine's dtype, on rank 0's CPU; {} on the other ranks. Every rank must call it."""
    state = {}
    for name, p in trainable(model):
        with deepspeed.zero.GatheredParameters([p]):
            if p.shape != p.ds_shape:
                raise RuntimeError(f"{name} has the shape {tuple(p.shape)} after gathering, not {tuple(p.ds_shape)}; nothing was written")
            if ranks.is_main:
                state[name] = p.detach().cpu().clone().contiguous()
    return state


def write_model(model, state: dict[str, torch.Tensor], config: Config, folder: Path) -> None:
    """Writes gathered weights. Raises RuntimeError when PEFT would leave one of them out."""
    if not isinstance(model, PeftModel):
        for a, b in getattr(model, "all_tied_weights_keys", {}).items():
            state.setdefault(a, state[b]) if b in state else state.setdefault(b, state[a])
        return model.save_pretrained(folder, state_dict=state)
    tensors = get_peft_model_state_dict(model, state_dict=state)
    if len(tensors) != len(state):
        raise RuntimeError(f"the adapter would hold {len(tensors)} of the {len(state)} trained tensors; nothing was written")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    peft_config = model.peft_config["default"]
    peft_config.inference_mode = True
    peft_config.save_pretrained(folder)
    # The adapter was trained against this rounding of the base; generation and merging read it here.
    trained = {"method": config.method, "revision": config.revision, "double_quant": config.double_quant,
               "dtype": str(next(iter(state.values())).dtype).removeprefix("torch.")}  # fmt: skip
    (folder / "trained.json").write_text(json.dumps(trained))
