"""A checkpoint of a run as the run would have exported it: `./launch.sh export`.

It needs the run's folder and the base's configuration, and none of the base's weights: a model on
torch's meta device tells PEFT and transformers all that they write.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ..checkpoint.store import UNREADABLE, is_checkpoint, read_masters, step_of, verified_manifest
from ..config.cli import load_config
from ..config.schema import Config, ConfigError, check_path
from ..data.batch_plan import plan_run
from ..data.dataset import load_examples, load_training_data
from ..distributed.files import atomic_folder
from ..distributed.world import on_gpu
from ..model.loading import checked_base, config_errors_for, load_tokenizer
from ..model.quantization import compute_dtype
from ..optim.adamw import trainable_parameters
from ..untrusted.bases import read_model_config
from .adapter import provenance_of, save_tokenizer, write_model
from .audit import AuditError, audit_loss, check_tensor, describe_audit
from .card import describe_run, write_papers


@dataclass(frozen=True)
class SavedStep:
    """A checkpoint that was verified, and the run that it belongs to."""

    path: Path
    manifest: dict[str, Any]
    config: Config  # of the run
    dtype: torch.dtype  # of the run's engine, and so of what it exports

    @property
    def step(self) -> int:
        return step_of(self.path)


def read_checkpoint(checkpoint: str) -> SavedStep:
    """A checkpoint's folder, with the hashes of its files verified; `best` and `newest` are taken.

    Raises ConfigError where it is no checkpoint in a run's folder, AuditError where it is torn.
    """
    check_path("--checkpoint", checkpoint)
    path = Path(os.path.realpath(checkpoint))  # of a link to itself, it is what it was
    if not (path / "manifest.json").is_file() or not is_checkpoint(path):
        raise ConfigError(
            f"--checkpoint {checkpoint}: is no checkpoint; give runs/NAME/checkpoints/step-000200, "
            "or best or newest in the place of the step"
        )
    run = path.parent.parent
    for name in ("config.yaml", "ds_config.json"):
        if not (run / name).is_file():
            raise ConfigError(
                f"--checkpoint {checkpoint}: {run} has no {name}; a checkpoint is read in the "
                "folder of its run"
            )
    try:
        manifest = verified_manifest(path)
    except UNREADABLE as error:
        raise AuditError(f"--checkpoint {checkpoint}: {error}") from error
    config = load_config(["--config", str(run / "config.yaml")])
    run_keys = config.run.model_copy(update={"dir": str(run.parent), "name": run.name})
    try:
        dtype = compute_dtype(json.loads((run / "ds_config.json").read_text()))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"--checkpoint {checkpoint}: {run}/ds_config.json is broken ({type(error).__name__})"
        ) from error
    return SavedStep(path, manifest, config.model_copy(update={"run": run_keys}), dtype)


def export_checkpoint(checkpoint: str, out: str) -> tuple[Path, int]:
    """Writes what the run would have exported at that step. Returns (the folder `out`, the step).

    That is an adapter in PEFT's format, or with method=full a model. The files are read back and
    compared, as at the end of a run. Nothing is left of the folder when something goes wrong.

    Args:
        checkpoint: its folder, in the run's.
        out: a folder that is new or empty.

    Raises ConfigError, AuditError where the checkpoint or what was written is not what was trained,
    OSError and SafetensorError where nothing can be written.
    """
    saved = read_checkpoint(checkpoint)
    config = saved.config
    model = model_without_weights(config, saved.dtype)
    state = trained_weights(saved, model)
    tokenizer = load_tokenizer(config.base, config.revision)
    with atomic_folder(Path(out)) as folder:
        save_tokenizer(tokenizer, folder)
        write_model(model, state, config, folder)
        trained = provenance_of(folder, config, saved.dtype)
        check_base(saved, trained)
        write_papers(folder, trained | facts_of_run(saved, tokenizer))
    return Path(out), saved.step


def model_without_weights(config: Config, dtype: torch.dtype) -> nn.Module:
    """The run's model, with its LoRA, on torch's meta device. Raises ConfigError."""
    with config_errors_for(config.base):
        model_config = read_model_config(checked_base(config.base), config.revision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=False)
        model.name_or_path = config.base
        model.requires_grad_(config.method == "full")
        if config.method == "full":
            return model
        lora_config = LoraConfig(task_type="CAUSAL_LM", **config.lora)
        return get_peft_model(model, lora_config, autocast_adapter_dtype=False)


def trained_weights(saved: SavedStep, model: nn.Module) -> dict[str, torch.Tensor]:
    """The checkpoint's weights by name, in the dtype of the run's engine.

    Raises AuditError naming the first one that is not the model's, missing, empty or not finite.
    """
    shapes = {name: p.shape for name, p in trainable_parameters(model)}
    state = {}
    for name, master in read_masters(saved.path, sorted(saved.manifest["files"])):
        if shapes.get(name) != master.shape:
            raise AuditError(f"{saved.path}: its {name} is not of the model in config.yaml")
        check_tensor(name, master)
        state[name] = master.to(saved.dtype)
    if missing := sorted(shapes.keys() - state.keys()):
        raise AuditError(f"{saved.path}: has no {missing[0]}")
    return state


def check_base(saved: SavedStep, trained: dict[str, Any]) -> None:
    """Raises AuditError where the base is not the one that was trained on.

    trained: of `provenance`, which reads the base's files as they are now.
    """
    then = saved.manifest["identity"]["state"]["base"]
    if trained["base_fingerprint"] != then:
        raise AuditError(
            f"{saved.path}: trained on {saved.config.base}, which has another content now"
        )


def facts_of_run(saved: SavedStep, tokenizer) -> dict[str, Any]:
    """What the card says of the run; only the step where the run's data is not at hand."""
    config = saved.config
    facts: dict[str, Any] = {"steps": saved.step}
    with contextlib.suppress(ConfigError):
        data = load_training_data(config, tokenizer)
        plan = plan_run(config, data.lengths, data.weights)
        facts = describe_run(config, data, plan, saved.step)
    return facts | {"versions": saved.manifest["versions"]}  # of the training, not of today


@contextlib.contextmanager
def adapter_of_checkpoint(checkpoint: str) -> Iterator[str]:
    """A context with a checkpoint's adapter in a folder of its own, which is deleted at the end.

    Raises what `export_checkpoint` raises, and ConfigError for a run without an adapter.
    """
    if read_checkpoint(checkpoint).config.method == "full":
        raise ConfigError(
            f"--checkpoint {checkpoint}: method=full has no adapter; ./launch.sh export writes the "
            "model"
        )
    with tempfile.TemporaryDirectory() as folder:
        yield str(export_checkpoint(checkpoint, f"{folder}/adapter")[0])


def audit_checkpoint(checkpoint: str) -> str:
    """Whether a checkpoint holds what was trained; one line on what was found.

    Its files must have their hashes, and a standalone process must get the run's validation loss of
    that step, on all of data.valid, with what is exported from it. Raises AuditError, ConfigError
    and what `export_checkpoint` raises.
    """
    saved = read_checkpoint(checkpoint)
    config = saved.config
    loss = (saved.manifest["figures"] or {}).get("eval/loss")
    with tempfile.TemporaryDirectory() as temporary:
        folder, step = export_checkpoint(checkpoint, f"{temporary}/exported")
        if loss is None:
            return (
                f"audit       step {step}: the files are what was written; that step was not "
                "validated, so there is no loss to compare with"
            )
        examples, _ = load_examples(config, load_tokenizer(config.base, config.revision), "valid")
        device = "cuda:0" if on_gpu() else "cpu"
        timeout = 60 * config.run.stall_timeout_minutes
        return describe_audit(audit_loss(folder, examples, loss, device, timeout))
