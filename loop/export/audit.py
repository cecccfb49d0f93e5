"""Whether what a run hands out is what was trained: the files against the gathered weights, and the loss in a process that only knows PEFT.

Under ZeRO-3 an adapter is easily saved empty (trl#4416, DeepSpeed#7900), and nobody sees it: PEFT loads what is there and only warns.
`./launch.sh audit --config runs/NAME/config.yaml` looks again, whenever one likes.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors import SafetensorError, safe_open

from ..checkpoint.identity import base_fingerprint
from ..config.schema import Config, ConfigError
from ..data.dataset import load_examples
from ..data.tokenization import Example
from ..distributed.files import sha256
from ..distributed.world import on_gpu
from ..model.loading import load_tokenizer, resolve_base
from ..model.lora import read_adapter

WEIGHTS = "adapter_model.safetensors"
# The run packs examples into rows, computes in bf16 and adds in another order than a process that takes them one by one.
RELATIVE, ABSOLUTE = 0.01, 0.001  # of the loss, and in nats a token; seen: 3e-4 of a loss of 0.054


class AuditError(RuntimeError):
    """What was written is not what was trained."""


def tensors_of(folder: Path):
    """(name, tensor) of everything in the safetensors of a folder, one at a time. Raises AuditError when a file can't be read."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise AuditError(f"{path.name} cannot be read back ({error})") from error


def check_tensor(name: str, tensor: torch.Tensor) -> None:
    if not tensor.numel():
        raise AuditError(f"{name} is empty, of shape {list(tensor.shape)}")
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise AuditError(f"{name} holds a value that is no number")


def audit_weights(folder: Path, trained: dict[str, torch.Tensor]) -> None:
    """Reads the weights of a folder from disk and holds them against `trained`, the gathered weights by their names in the file: the same
    names, shapes and dtypes, none empty, all finite, equal to the bit. Raises AuditError naming the first tensor that is not."""
    written = set()
    for name, tensor in tensors_of(folder):
        check_tensor(name, tensor)
        if name not in trained:
            raise AuditError(f"{name} was not trained")
        if (tensor.shape, tensor.dtype) != (trained[name].shape, trained[name].dtype):
            raise AuditError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, trained was {trained[name].dtype} {list(trained[name].shape)}"
            )
        if not torch.equal(
            tensor.flatten().view(torch.uint8), trained[name].flatten().view(torch.uint8)
        ):
            raise AuditError(f"{name} is not what was trained")
        written.add(name)
    # of two names that share a weight, a whole model keeps one
    kept = {tensor.data_ptr() for name, tensor in trained.items() if name in written}
    if missing := [
        name
        for name, tensor in trained.items()
        if name not in written and tensor.data_ptr() not in kept
    ]:
        raise AuditError(
            f"{missing[0]} is missing" + (f", and {len(missing) - 1} more" if missing[1:] else "")
        )


def provenance(config: Config, dtype: torch.dtype, weights: Path) -> dict:
    """What `trained.json` says beside an adapter: the base by name and content, how its weights were stored while the adapter was trained
    against them (generation, merging and audits do the same), and the hash of the adapter's own."""
    return {
        "base": config.base,
        "revision": config.revision,
        "base_fingerprint": base_fingerprint(config.base, config.revision),
        "method": config.method,
        "storage": "nf4" if config.method == "qlora" else str(dtype).removeprefix("torch."),
        "double_quant": config.double_quant,
        "dtype": str(dtype).removeprefix("torch."),
        "sha256": sha256(weights),
    }


def audit_config(folder: Path, config: Config, lora: PeftConfig) -> None:
    """Reads adapter_config.json and trained.json of a folder and holds them against the run. Raises AuditError naming the field."""
    written = PeftConfig.from_pretrained(str(folder))
    if (
        resolve_base(written.base_model_name_or_path) != resolve_base(config.base)
        or written.revision != config.revision
    ):
        raise AuditError(
            f"adapter_config.json names the base {written.base_model_name_or_path}, revision {written.revision}; trained was on "
            f"{config.base}, revision {config.revision}"
        )
    is_now = written.to_dict()
    if other := [key for key, value in lora.to_dict().items() if is_now.get(key) != value]:
        raise AuditError(
            f"adapter_config.json says {other[0]}={is_now.get(other[0])}, trained was {lora.to_dict()[other[0]]}"
        )
    trained = json.loads((folder / "trained.json").read_text())
    expected = provenance(config, getattr(torch, trained["dtype"]), folder / WEIGHTS)
    if other := [key for key, value in expected.items() if trained.get(key) != value]:
        raise AuditError(
            f"trained.json says {other[0]}={trained.get(other[0])}, it is {expected[other[0]]}"
        )


def check_adapter(adapter: str, base: str | None = None) -> dict:
    """An adapter folder long after its run: what `read_adapter` says of it, if its tensors are whole, are the ones that the run wrote, and
    the base (by default the one that it names) has the content that it was trained on. An adapter from elsewhere has neither hash: then
    only what can be seen is checked. Raises AuditError, and ConfigError where there is no adapter."""
    trained, folder = read_adapter(adapter), Path(adapter)
    if "sha256" in trained and trained["sha256"] != sha256(folder / WEIGHTS):
        raise AuditError(
            f"--adapter {adapter}: {WEIGHTS} is not the file that the run wrote (its hash differs); copy or train it again"
        )
    try:
        for name, tensor in tensors_of(folder):
            check_tensor(name, tensor)
    except AuditError as error:
        raise AuditError(f"--adapter {adapter}: {error}") from error
    base = base or trained["base"]
    if "base_fingerprint" in trained and trained["base_fingerprint"] != base_fingerprint(
        base, trained["revision"]
    ):
        raise AuditError(
            f"--adapter {adapter}: trained on {trained['base']}, and {base} has another content now; name that base"
        )
    return trained


def standalone_loss(folder: Path, examples: list[Example], device, timeout: float) -> float | str:
    """The loss of examples by `fresh.py`, in a process that gets its text and not this project; in nats a supervised token. Where it could
    not be measured (no memory, no time, a signal), why. Raises AuditError when the folder can't be loaded."""
    rows = json.dumps(
        [(e.input_ids.tolist(), e.labels.tolist()) for e in examples]
    )  # by a pipe: patients' words stay off the disk
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    command = [
        sys.executable,
        "-c",
        Path(__file__).with_name("standalone_loss.py").read_text("utf-8"),
        str(folder),
        str(device),
    ]
    try:
        done = subprocess.run(
            command, input=rows, capture_output=True, text=True, timeout=timeout, env=env
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        return type(error).__name__
    if done.returncode == 0:
        return float(done.stdout.split()[-1])
    said = (done.stderr.strip().splitlines() or ["nothing"])[-1][:160]
    if done.returncode < 0 or re.search(
        r"out ?of ?memory|busy or unavailable|ALLOC_FAILED", done.stderr, re.IGNORECASE
    ):
        return (
            f"signal {-done.returncode}"
            if done.returncode < 0
            else "not enough memory beside the run"
        )
    raise AuditError(f"transformers and PEFT cannot load it ({said})")


def audit_loss(
    folder: Path, examples: list[Example], loss: float, device, timeout: float = 300
) -> dict:
    """Holds the loss of a fresh process against the run's own on the same examples. Returns figures for the report. Raises AuditError."""
    fresh = standalone_loss(folder, examples, device, timeout)
    figures = {"examples": len(examples), "loss": loss, "fresh": fresh}
    if isinstance(fresh, float) and not math.isclose(
        fresh, loss, rel_tol=RELATIVE, abs_tol=ABSOLUTE
    ):
        raise AuditError(
            f"a fresh process with transformers and PEFT gets the loss {fresh:.4f} on {len(examples)} examples, the run {loss:.4f}"
        )
    return figures


def describe_audit(audit: dict) -> str:
    """One line on what `audit_loss` returned; {}: the files alone were looked at."""
    said = "audit       the files hold what was trained, to the bit"
    if not audit:
        return said
    if isinstance(audit["fresh"], str):
        return f"{said}; the loss in a fresh process was not measured ({audit['fresh']}): ./launch.sh audit does it by hand"
    return f"{said}; loss on {audit['examples']} examples {audit['loss']:.4f}, in a fresh process with PEFT alone {audit['fresh']:.4f}"


def audit_run(config: Config) -> str:
    """Looks again at what a finished run wrote, and says what was found. Raises AuditError, and ConfigError where there is nothing to look at."""
    folder = config.folder / ("model" if config.method == "full" else "adapter")
    if not folder.is_dir():
        raise ConfigError(f"run.name={config.run.name}: there is no {folder}; train first")
    if config.method == "full":
        for name, tensor in tensors_of(folder):
            check_tensor(name, tensor)
    else:
        check_adapter(str(folder))
    report = config.folder / "report.json"
    noted = json.loads(report.read_text()).get("audit") if report.is_file() else None
    if not noted:
        raise ConfigError(
            f"{report}: notes no loss to compare with; the files are whole. Train with run.export_check_examples above 0"
        )
    split = "valid" if noted["split"] == "valid" else "train"
    examples = load_examples(config, load_tokenizer(config.base, config.revision), split)[0][
        : noted["examples"]
    ]
    return describe_audit(
        audit_loss(folder, examples, noted["loss"], "cuda:0" if on_gpu() else "cpu")
    )
