"""Atomic checkpoints that another number of ranks can continue from.

`checkpoints/step-000200/` holds `state-00000.safetensors` ... (for every trainable parameter its fp32 master and Adam moments, whole, not
sharded) and `manifest.json` (step, identity, RNG states, sizes and hashes). Nothing is pickled. A checkpoint is written under another name,
fsynced and renamed, so one that has the right name is whole; its hashes are checked again before it is read. `newest` and `best` are links.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..config.schema import ConfigError
from ..distributed.files import _fsync, sha256
from ..distributed.seeding import get_rng_state, set_rng_state
from ..distributed.watchdog import set_activity
from ..distributed.world import Ranks
from ..optim.adamw import trainable_parameters
from ..zero3.optimizer_state import (
    KINDS,
    adam_step,
    create_adam_state,
    gather_full_state,
    scatter_full_tensor,
)


class Checkpointer:
    """The checkpoints of one run's folder: the last `keep`, and the one with the best validation loss."""

    def __init__(self, folder: Path, ranks: Ranks, keep: int) -> None:
        self.folder, self.ranks, self.keep = folder / "checkpoints", ranks, keep
        self.torn: set[str] = set()  # names of those passed over

    def finished(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted((p for p in self.folder.glob("step-*") if p.name[5:].isdigit()), key=_step_of)

    def save(self, engine, step: int, manifest: dict) -> str | None:
        """Writes the state after `step` steps; every rank must call it. manifest: what else shall stand there, in JSON's types.
        Returns None, or what went wrong: a full disk must not end a run whose older checkpoints are whole."""
        set_activity("saving a checkpoint")
        if adam_step(engine) == 0:  # every step so far was skipped: Adam has no state yet
            create_adam_state(engine, 0)
        rng = self.ranks.all_gather_json(get_rng_state())
        stream, problem = gather_full_state(engine, self.ranks), None
        if self.ranks.is_main:
            try:
                self._write(
                    step,
                    stream,
                    {"step": step, "optimizer_step": adam_step(engine), "rng": rng} | manifest,
                )
            except (
                OSError,
                SafetensorError,
            ) as error:  # safetensors has its own error for a full disk
                shutil.rmtree(self._aside(step), ignore_errors=True)
                problem = f"checkpoint of step {step} not written: {error} ({self.folder}); older ones stay"
        for _ in (
            stream
        ):  # the other ranks, and rank 0 after a failure: all must take part in every gather
            pass
        dist.barrier()
        return problem

    def _aside(self, step: int) -> Path:
        return self.folder / f".writing-{step:06d}"

    def _write(self, step: int, stream: Iterator[dict[str, torch.Tensor]], manifest: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        aside, files = self._aside(step), {}
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for number, tensors in enumerate(stream):
            path = aside / f"state-{number:05d}.safetensors"
            save_file(tensors, path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        (aside / "manifest.json").write_text(json.dumps(manifest | {"files": files}))
        for path in [*aside.iterdir(), aside]:
            _fsync(path)
        final = self.folder / f"step-{step:06d}"
        if final.exists():  # a torn one of the same step, after a resume from an older one
            self._put_away(final)
        aside.rename(final)
        _fsync(self.folder)
        with contextlib.suppress(
            OSError
        ):  # the new one is whole; what could not be tidied is tried again after the next
            self._tidy(final)

    def _put_away(self, path: Path) -> None:
        """Takes the name from a checkpoint before it is deleted: half deleted, it must not look like one."""
        old = self.folder / f".old-{path.name}"
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)

    def _tidy(self, newest: Path) -> None:
        """Points to the newest and the best, and deletes what is neither nor among the last `keep`. One that is known to be torn counts
        for none of them, and goes only now that a newer one is whole."""
        whole = [
            p
            for p in self.finished()
            if p == newest or (p.name not in self.torn and _step_of(p) < _step_of(newest))
        ]
        losses = {p: loss for p in whole if (loss := _validation_loss(p)) is not None}
        best = min(losses, key=lambda p: losses[p], default=newest)
        with contextlib.suppress(
            OSError
        ):  # not every file system has links; what is old goes all the same
            for name, target in (("newest", newest), ("best", best)):
                link = self.folder / f".{name}"
                link.unlink(missing_ok=True)
                link.symlink_to(target.name)
                link.replace(self.folder / name)
        for old in set(self.finished()) - {best, *whole[-self.keep :]}:
            self._put_away(old)
        for leftover in [*self.folder.glob(".old-*"), *self.folder.glob(".writing-*")]:
            shutil.rmtree(leftover, ignore_errors=True)

    def agree_on_newest(self) -> tuple[Path | None, dict, list[str]]:
        """Rank 0's `newest`, on every rank. Raises ConfigError on all of them where one can't see the file that it needs, or when there are
        checkpoints and none is whole: a person must say that all of that work is to be done again."""
        found = self.newest() if self.ranks.is_main else (None, {}, [])
        name, manifest, remarks = self.ranks.all_gather_json(
            [found[0] and found[0].name, *found[1:]]
        )[0]
        path = self.folder / name if name else None
        if self.ranks.any(path is not None and not (path / "manifest.json").is_file()):
            raise ConfigError(
                f"{path}: not every rank can read it; run.dir must be a folder that all machines share"
            )
        if self.ranks.any(bool(self.torn) and path is None):
            raise ConfigError(
                f"{self.folder}: no checkpoint is whole ({'; '.join(remarks)}); repair one, or start over with run.resume=false"
            )
        return path, manifest, remarks

    def newest(self) -> tuple[Path | None, dict, list[str]]:
        """The newest whole checkpoint with its manifest, and a remark for each one passed over because it is not whole."""
        remarks = [
            f"{p.name.removeprefix('.')} passed over: it was never finished"
            for p in sorted(self.folder.glob(".writing-*"))
        ]
        for path in reversed(self.finished()):
            try:
                manifest = json.loads((path / "manifest.json").read_text())
                for name, known in manifest["files"].items():
                    set_activity(f"checking {path.name}")
                    if (path / name).stat().st_size != known["bytes"] or sha256(
                        path / name
                    ) != known["sha256"]:
                        raise ValueError(f"{name} is not what was written")
                return path, manifest, remarks
            except (OSError, ValueError, KeyError, TypeError) as error:
                self.torn.add(path.name)
                remarks.append(f"{path.name} passed over: {error}")
        return None, {}, remarks

    def load(self, engine, path: Path, manifest: dict) -> None:
        """Puts a checkpoint into the engine, right after `deepspeed.initialize`; every rank must call it. Raises ConfigError naming the
        first tensor that is not this model's."""
        create_adam_state(engine, manifest["optimizer_step"])
        parameters: dict[str, Any] = dict(
            trainable_parameters(engine.module)
        )  # Any: ZeRO-3 gives each a ds_shape
        expected = {f"{name}.{kind}" for name in parameters for kind in KINDS}
        for file_name in sorted(manifest["files"]):
            with safe_open(path / file_name, "pt") as file:
                for key in file.keys():
                    name, kind = key.rsplit(".", 1)
                    if key not in expected or tuple(file.get_slice(key).get_shape()) != tuple(
                        parameters[name].ds_shape
                    ):
                        raise ConfigError(f"{path}: its {key} is not this model's")
                    scatter_full_tensor(parameters[name], kind, file.get_tensor(key), self.ranks)
                    expected.remove(key)
        if expected:
            raise ConfigError(f"{path}: has no {min(expected)}")
        if (
            len(manifest["rng"]) == self.ranks.world_size
        ):  # another number of ranks: what they drew was theirs alone
            set_rng_state(manifest["rng"][self.ranks.rank])


def _step_of(path: Path) -> int:
    return int(path.name[5:])


def _validation_loss(path: Path) -> float | None:
    try:
        loss = json.loads((path / "manifest.json").read_text())["figures"]["eval/loss"]
        return loss if math.isfinite(loss) else None
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ):  # it was saved between two evaluations, or without one
        return None
