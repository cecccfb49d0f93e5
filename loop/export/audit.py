"""The audit of an export: its files against the trained weights, its loss in a process of its own.

Under ZeRO-3 an adapter is easily saved empty (DeepSpeed#7900), and nobody notices: PEFT loads what
is there and only warns. A run audits what it writes; `audit_run` does it again later.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors import SafetensorError, safe_open

from ..checkpoint.identity import base_fingerprint
from ..checkpoint.run_dir import read_report
from ..config.schema import Config, ConfigError
from ..data.dataset import load_examples
from ..data.tokenization import Example
from ..distributed.files import sha256
from ..distributed.progress import Progress
from ..distributed.timeline import timed
from ..distributed.world import on_gpu
from ..generation.prompt import describe_prompt
from ..model.loading import load_tokenizer, resolve_base
from ..model.lora import WEIGHTS, describe_start, is_as_written, read_adapter

# Tolerances of the loss, relative and in nats per token. The run packs examples into rows, computes
# in bf16 and adds in another order than a process that takes them one by one. Seen: a difference of
# 3e-4 of a loss of 0.054.
RELATIVE_TOLERANCE = 0.01
ABSOLUTE_TOLERANCE = 0.001
# Of the environment: what would make the standalone process a rank of the run.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class AuditError(RuntimeError):
    """What was written is not what was trained."""


# ---- weights


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all safetensors files of a folder, one at a time.

    Raises AuditError when a file can't be read.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise AuditError(f"{path.name} cannot be read back ({error})") from error


def check_tensor(name: str, tensor: torch.Tensor) -> None:
    """Raises AuditError for a tensor that is empty, or holds a NaN or an infinity."""
    if not tensor.numel():
        raise AuditError(f"{name} is empty, of shape {list(tensor.shape)}")
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise AuditError(f"{name} holds a value that is no number")


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bytes; 0.0 and -0.0 differ."""
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def audit_weights(folder: Path, trained: dict[str, torch.Tensor]) -> None:
    """Reads the weights of a folder from disk and compares them with `trained`, bit for bit.

    trained: the gathered weights by their names in the files. Names, shapes and dtypes must be the
    same, no tensor empty, all values finite. Raises AuditError naming the first tensor that is not.
    """
    written = set()
    for name, tensor in read_tensors(folder):
        check_tensor(name, tensor)
        if name not in trained:
            raise AuditError(f"{name} was not trained")
        expected = trained[name]
        if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
            raise AuditError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, trained was {expected.dtype} "
                f"{list(expected.shape)}"
            )
        if not equal_bits(tensor, expected):
            raise AuditError(f"{name} is not what was trained")
        written.add(name)
    # A full model is saved with one of two names that share a weight.
    written_storage = {tensor.data_ptr() for name, tensor in trained.items() if name in written}
    missing = [
        name
        for name, tensor in trained.items()
        if name not in written and tensor.data_ptr() not in written_storage
    ]
    if missing:
        others = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise AuditError(f"{missing[0]} is missing{others}")


# ---- what the files say of the run


def provenance(config: Config, dtype: torch.dtype, weights: Path | None) -> dict:
    """The content of `trained.json`, which lies beside an adapter.

    It has the base's name and fingerprint, how the base was stored while the adapter was trained on
    it (generation, merging and audits store it alike), how the run's own notes were written, the
    prompt (None where the rows brought their own), the adapters that it was trained on from, and
    the hash of the adapter's weights.
    dtype: of the adapter; weights: its file, or None for a full model.
    """
    dtype_name = str(dtype).removeprefix("torch.")
    own_prompts = (
        bool({"messages", "conversations"} & set(config.data.columns))
        or config.data.supervise == "all"
    )
    tokenizer = load_tokenizer(config.base, config.revision)
    described: dict[str, Any] = {
        "base": config.base,
        "revision": config.revision,
        "base_fingerprint": base_fingerprint(config.base, config.revision),
        "method": config.method,
        "storage": config.quantization or dtype_name,
        "double_quant": config.double_quant,
        "dtype": dtype_name,
        "generation": config.generation.model_dump(mode="json"),
        "prompt": None if own_prompts else describe_prompt(tokenizer, config.task),
        "max_seq_len": config.max_seq_len,
    }
    if config.adapter:
        described["started_from"] = describe_start(config.adapter)
    return described | {"sha256": sha256(weights)} if weights else described


def audit_config(folder: Path, config: Config, lora: PeftConfig) -> None:
    """Reads adapter_config.json and trained.json from disk and compares them with the run.

    lora: as it was trained. Raises AuditError naming the field that differs.
    """
    written = PeftConfig.from_pretrained(str(folder))
    written_base = resolve_base(written.base_model_name_or_path, written.revision)
    same_base = written_base == resolve_base(config.base, config.revision)
    if not same_base or written.revision != config.revision:
        raise AuditError(
            f"adapter_config.json names the base {written.base_model_name_or_path}, revision "
            f"{written.revision}; trained was on {config.base}, revision {config.revision}"
        )
    fields = written.to_dict()
    trained_fields = lora.to_dict()
    if key := first_difference(fields, trained_fields):
        raise AuditError(
            f"adapter_config.json says {key}={fields.get(key)}, trained was {trained_fields[key]}"
        )
    trained = json.loads((folder / "trained.json").read_text())
    expected = provenance(config, getattr(torch, trained["dtype"]), folder / WEIGHTS)
    if key := first_difference(trained, expected):
        raise AuditError(f"trained.json says {key}={trained.get(key)}, it is {expected[key]}")


def first_difference(found: dict, expected: dict) -> str | None:
    """The first key of `expected` that has another value in `found`, or none there."""
    for key, value in expected.items():
        if found.get(key) != value:
            return key
    return None


def check_adapter(adapter: str, base: str | None = None) -> dict:
    """Checks an adapter's folder long after its run; returns what `read_adapter` says of it.

    Its tensors must be sound and the ones that the run wrote, and the base (by default the one that
    the adapter names) must have the content that it was trained on. An adapter from elsewhere has
    neither hash: then only the tensors are checked. Raises AuditError, and ConfigError where there
    is no adapter.
    """
    trained = read_adapter(adapter)
    folder = Path(adapter)
    if not is_as_written(folder, trained):
        raise AuditError(
            f"--adapter {adapter}: {WEIGHTS} is not the file that the run wrote (its hash "
            "differs); copy or train it again"
        )
    try:
        for name, tensor in read_tensors(folder):
            check_tensor(name, tensor)
    except AuditError as error:
        raise AuditError(f"--adapter {adapter}: {error}") from error
    base = base or trained["base"]
    if "base_fingerprint" in trained:
        if trained["base_fingerprint"] != base_fingerprint(base, trained["revision"]):
            raise AuditError(
                f"--adapter {adapter}: trained on {trained['base']}, and {base} has another "
                "content now; name that base"
            )
    return trained


# ---- the loss


_started: list[subprocess.Popen] = []  # the process that waits for its request, if there is one


def start_standalone_process() -> None:
    """Starts the process of `standalone_loss` ahead of time, so that its imports are done by then.

    It takes neither a GPU nor a core while it waits, and ends when this process does. Where one
    waits already, nothing happens.
    """
    if _started:
        return
    script = Path(__file__).with_name("standalone_loss.py").read_text("utf-8")
    environment = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
    _started.append(
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tempfile.gettempdir(),  # an adapter must load from anywhere
            env=environment,
        )
    )


def stop_standalone_process() -> None:
    """Ends the process if one still waits, as in a run that ends without its audit."""
    while _started:
        process = _started.pop()
        process.kill()
        process.communicate()


def standalone_loss(folder: Path, examples: list[Example], device, timeout: float) -> float | str:
    """The mean loss of examples in a process that gets the text of standalone_loss.py.

    So nothing of this project computes it. Returns nats per supervised token; or, where the loss
    could not be measured (no memory, no time, a signal), the reason. timeout: in seconds. Raises
    AuditError when transformers and PEFT can't load the folder.
    """
    # By a pipe: patients' words stay off the disk.
    rows = [(e.input_ids.tolist(), e.labels.tolist()) for e in examples]
    try:
        start_standalone_process()
        process = _started[-1]
        request = json.dumps([str(folder.absolute()), str(device), rows])
        with Progress("checking the export in a process of its own"):
            answer, errors = process.communicate(request, timeout=timeout)
    except (subprocess.TimeoutExpired, OSError) as error:
        return type(error).__name__
    finally:
        stop_standalone_process()
    if process.returncode == 0:
        return float(answer.split()[-1])
    if process.returncode < 0:
        return f"signal {-process.returncode}"
    no_memory = r"out ?of ?memory|busy or unavailable|ALLOC_FAILED"
    if re.search(no_memory, errors, re.IGNORECASE):
        return "not enough memory beside the run"
    last_line = (errors.strip().splitlines() or ["nothing"])[-1]
    raise AuditError(f"transformers and PEFT cannot load it ({last_line[:160]})")


@timed("audit")
def audit_loss(
    folder: Path, examples: list[Example], loss: float, device, timeout: float = 300
) -> dict:
    """Compares the loss of a standalone process with the run's own on the same examples.

    Returns what the report holds: {"examples": their number, "loss": the run's, "fresh": the
    standalone one, or why there is none}. Raises AuditError when the two differ.
    """
    standalone = standalone_loss(folder, examples, device, timeout)
    if isinstance(standalone, float) and not math.isclose(
        standalone, loss, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE
    ):
        raise AuditError(
            f"a fresh process with transformers and PEFT gets the loss {standalone:.4f} on "
            f"{len(examples)} examples, the run {loss:.4f}"
        )
    return {"examples": len(examples), "loss": loss, "fresh": standalone}


def describe_audit(audit: dict) -> str:
    """One line on what `audit_loss` returned; {}: only the files were compared."""
    files = "audit       the files hold what was trained, to the bit"
    if not audit:
        return files
    standalone = audit["fresh"]
    if isinstance(standalone, str):
        return (
            f"{files}; the loss in a fresh process was not measured ({standalone}): ./launch.sh "
            "audit does it by hand"
        )
    return (
        f"{files}; loss on {audit['examples']} examples {audit['loss']:.4f}, in a fresh process "
        f"with PEFT alone {standalone:.4f}"
    )


def audit_run(config: Config) -> str:
    """Audits again what a finished run wrote; returns one line on what was found.

    Raises AuditError, and ConfigError where there is nothing to look at.
    """
    folder = config.folder / ("model" if config.method == "full" else "adapter")
    if not folder.is_dir():
        raise ConfigError(f"run.name={config.run.name}: there is no {folder}; train first")
    if config.method == "full":
        for name, tensor in read_tensors(folder):
            check_tensor(name, tensor)
    else:
        check_adapter(str(folder))
    report = config.folder / "report.json"
    noted = read_report(config.folder).get("audit")
    if not noted:
        raise ConfigError(
            f"{report}: notes no loss to compare with; the files are complete. Train with "
            "run.export_check_examples above 0"
        )
    split = "valid" if noted["split"] == "valid" else "train"
    tokenizer = load_tokenizer(config.base, config.revision)
    examples, _ = load_examples(config, tokenizer, split)
    device = "cuda:0" if on_gpu() else "cpu"
    return describe_audit(audit_loss(folder, examples[: noted["examples"]], noted["loss"], device))
