"""Atomic checkpoints that another number of ranks can continue from, and the adapter in PEFT's own format.

`checkpoints/step-000200/` holds `state.safetensors` (for every trainable parameter its fp32 master and Adam moments, whole, not
sharded) and `manifest.json` (step, fingerprints, RNG state, sizes and hashes). Nothing is pickled. A checkpoint is written under
another name, fsynced and renamed, so one that has the right name is whole; its hashes are checked again when it is read.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param, safe_get_full_optimizer_state, safe_set_local_fp32_param, safe_set_local_optimizer_state,
)  # fmt: skip
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import Config, ConfigError
from .distributed import Ranks
from .model import trainable
from .tokens import Example

MOMENTS = ("exp_avg", "exp_avg_sq")


class Checkpoints:
    """The checkpoints of one run's folder."""

    def __init__(self, folder: Path, ranks: Ranks, keep: int) -> None:
        self.folder, self.ranks, self.keep = folder / "checkpoints", ranks, keep

    def finished(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("step-*") if p.name[5:].isdigit())

    def save(self, engine, step: int, identity: dict) -> str | None:
        """Writes the state after `step` steps; every rank must call it. identity: what must be equal for the run to be continued.
        Returns None, or what went wrong: a full disk must not end a run whose older checkpoints are whole."""
        if _adam_step(engine) == 0:  # every step so far was skipped: Adam has no state yet
            _create_adam_state(engine, 0)
        tensors = {}
        for name, p in trainable(engine.module):
            whole = [safe_get_full_fp32_param(p), *(safe_get_full_optimizer_state(p, m) for m in MOMENTS)]  # a gather on all ranks
            if self.ranks.is_main:
                tensors |= {f"{name}.{kind}": t.detach().cpu().contiguous() for kind, t in zip(("master", *MOMENTS), whole)}
        rng = [None] * self.ranks.world_size
        torch.distributed.all_gather_object(rng, _rng_state())
        problem = None
        if self.ranks.is_main:
            try:
                self._write(step, tensors, {"step": step, "optimizer_step": _adam_step(engine), "identity": identity, "rng": rng})
            except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
                shutil.rmtree(self._aside(step), ignore_errors=True)
                problem = f"checkpoint of step {step} not written: {error} ({self.folder}); older ones stay"
        torch.distributed.barrier()
        return problem

    def _aside(self, step: int) -> Path:
        return self.folder / f".writing-{step:06d}"

    def _write(self, step: int, tensors: dict, manifest: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self._aside(step)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        save_file(tensors, aside / "state.safetensors")
        data = aside / "state.safetensors"
        manifest["files"] = {data.name: {"bytes": data.stat().st_size, "sha256": _sha256(data)}}
        (aside / "manifest.json").write_text(json.dumps(manifest))
        for path in [*aside.iterdir(), aside]:
            _fsync(path)
        final = self.folder / f"step-{step:06d}"
        shutil.rmtree(final, ignore_errors=True)  # the same step once more, after a resume from an older one
        aside.rename(final)
        _fsync(self.folder)
        for old in self.finished()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def agree_on_newest(self) -> tuple[Path | None, dict, list[str]]:
        """Rank 0's `newest`, on every rank. Raises ConfigError on all of them where one can't see the file that it needs."""
        found = [self.newest() if self.ranks.is_main else None]
        torch.distributed.broadcast_object_list(found)
        path, manifest, remarks = found[0]
        if self.ranks.any(path is not None and not (path / "state.safetensors").is_file()):
            raise ConfigError(f"{path}: not every rank can read it; run.dir must be a folder that all machines share")
        return path, manifest, remarks

    def newest(self) -> tuple[Path | None, dict, list[str]]:
        """The newest whole checkpoint with its manifest, and a remark for each one passed over because it is not whole."""
        remarks = []
        for path in reversed(self.finished()):
            try:
                manifest = json.loads((path / "manifest.json").read_text())
                for name, known in manifest["files"].items():
                    if (path / name).stat().st_size != known["bytes"] or _sha256(path / name) != known["sha256"]:
                        raise ValueError(f"{name} is not what was written")
                return path, manifest, remarks
            except (OSError, ValueError, KeyError) as error:
                remarks.append(f"{path.name} passed over: {error}")
        return None, {}, remarks

    def load(self, engine, path: Path, manifest: dict, identity: dict) -> int:
        """Puts a checkpoint into the engine, right after `deepspeed.initialize`; every rank must call it. Returns the step to go on with.
        Raises ConfigError naming the first difference when the checkpoint belongs to another run."""
        for key, value in identity.items():
            if manifest["identity"].get(key) != value:
                raise ConfigError(f"{path}: {key} was {manifest['identity'].get(key)!r} and is {value!r} now; "
                                  "give the run another run.name, or start over with run.resume=false")  # fmt: skip
        _create_adam_state(engine, manifest["optimizer_step"])
        parameters = trainable(engine.module)
        with safe_open(path / "state.safetensors", "pt") as file:
            missing = {f"{name}.master" for name, _ in parameters} ^ {k for k in file.keys() if k.endswith(".master")}
            if missing:
                raise ConfigError(f"{path}: its parameters are not this model's, e.g. {sorted(missing)[0]}")
            for name, p in parameters:
                master = file.get_tensor(f"{name}.master")
                safe_set_local_fp32_param(p, self._slice(master, p))
                for moment in MOMENTS:
                    safe_set_local_optimizer_state(p, self._slice(file.get_tensor(f"{name}.{moment}"), p), moment)
                with deepspeed.zero.GatheredParameters([p], modifier_rank=0):  # the working copy in the engine's dtype
                    if self.ranks.is_main:
                        p.data.copy_(master)
        if len(manifest["rng"]) == self.ranks.world_size:  # on another number of ranks, dropout draws anew
            _set_rng_state(manifest["rng"][self.ranks.rank])
        return manifest["step"]

    def _slice(self, whole: torch.Tensor, p) -> torch.Tensor:
        """This rank's zero-padded slice of a whole tensor, as ZeRO-3 lays it out."""
        size = p.ds_tensor.ds_numel
        flat = torch.nn.functional.pad(whole.flatten(), (0, size * self.ranks.world_size - whole.numel()))
        return flat.narrow(0, size * self.ranks.rank, size).to(self.ranks.device)


def fingerprint(examples: list[Example]) -> str:
    """A hash of what is trained on, after tokenising: other data, template or tokenizer give another one."""
    digest = hashlib.sha256()
    for e in examples:
        digest.update(e.id.encode() + e.input_ids.tobytes() + e.labels.tobytes())
    return digest.hexdigest()[:16]


def _create_adam_state(engine, step: int) -> None:
    """Adam's state does not exist before its first step: create it on ZeRO-3's flat partitions, at the saved step."""
    adam = engine.optimizer.optimizer
    for flat in engine.optimizer.fp32_partitioned_groups_flat:
        fused = any(group.get("fused") for group in adam.param_groups)  # its step counter lives beside the data
        count = torch.tensor(float(step), device=flat.device if fused else "cpu")
        adam.state[flat] = {"step": count, **{m: torch.zeros_like(flat) for m in MOMENTS}}


def _adam_step(engine) -> int:
    """How many updates Adam has made; skipped steps don't count."""
    return next((int(s["step"]) for s in engine.optimizer.optimizer.state.values() if "step" in s), 0)


def _rng_state() -> dict[str, str]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return {k: v.numpy().tobytes().hex() for k, v in state.items()}


def _set_rng_state(state: dict[str, str]) -> None:
    restored = {k: torch.frombuffer(bytearray.fromhex(v), dtype=torch.uint8) for k, v in state.items()}
    torch.set_rng_state(restored["cpu"])
    if "cuda" in restored and torch.cuda.is_available():
        torch.cuda.set_rng_state(restored["cuda"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read()).hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def export_model(engine, config: Config, tokenizer, folder: Path, ranks: Ranks) -> Path:
    """Writes what was trained: `adapter/` in PEFT's format, or with method=full `model/` in the hub's layout, each with the tokenizer.
    Every rank must call it: under ZeRO-3 a tensor that is not gathered would be saved empty (trl#4416). Returns the folder."""
    model, state = engine.module, {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            with deepspeed.zero.GatheredParameters([p]):
                if ranks.is_main:
                    state[name] = p.detach().cpu().clone().contiguous()
    target = folder / ("model" if config.method == "full" else "adapter")
    if ranks.is_main:
        if empty := [name for name, t in state.items() if t.numel() == 0]:
            raise RuntimeError(f"{target}: {empty[0]} is empty; nothing was written")
        if isinstance(model, PeftModel):
            target.mkdir(parents=True, exist_ok=True)
            save_file(get_peft_model_state_dict(model, state_dict=state), target / "adapter_model.safetensors", metadata={"format": "pt"})
            peft_config = model.peft_config["default"]
            peft_config.inference_mode = True
            peft_config.save_pretrained(target)
            # The adapter was trained against this rounding of the base; generation and merging read it here.
            trained = {"method": config.method, "revision": config.revision, "double_quant": config.double_quant,
                       "dtype": str(next(iter(state.values())).dtype).removeprefix("torch.")}  # fmt: skip
            (target / "trained.json").write_text(json.dumps(trained))
        else:
            for a, b in getattr(model, "all_tied_weights_keys", {}).items():
                state.setdefault(a, state[b]) if b in state else state.setdefault(b, state[a])
            model.save_pretrained(target, state_dict=state)
        tokenizer.save_pretrained(target)
    torch.distributed.barrier()
    return target
