"""Checkpoints on disk: written atomically, verified when they are read, deleted when they are old.

`checkpoints/step-000200/` holds `state-00000.safetensors`, ... and `manifest.json` with the size
and SHA-256 of each file. Nothing is pickled. A checkpoint is written under another name, fsynced
and renamed, so one with its final name is complete. `newest` and `best` are symbolic links.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..distributed.files import fsync, sha256
from ..distributed.watchdog import set_activity

Manifest = (
    dict  # of JSON's types; `TrainState.to_manifest` and `Checkpointer.save` say what is in it
)


class CheckpointStore:
    """The last `keep` checkpoints of a run directory, and the one with the best validation loss."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.folder = run_dir / "checkpoints"
        self.keep = keep
        self.corrupt: set[str] = set()  # names of checkpoints that failed verification

    def finished(self) -> list[Path]:
        """All checkpoints with a final name, oldest first."""
        paths = (p for p in self.folder.glob("step-*") if p.name[5:].isdigit())
        return sorted(paths, key=step_of)

    def write(
        self, step: int, tensor_files: Iterator[dict[str, torch.Tensor]], manifest: Manifest
    ) -> None:
        """Writes the checkpoint of `step`, a safetensors file for each dict of `tensor_files`.

        Raises OSError or SafetensorError when the disk is full; `discard` then removes the rest.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self._temporary(step)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        files = {}
        for number, tensors in enumerate(tensor_files):
            path = temporary / f"state-{number:05d}.safetensors"
            save_file(tensors, path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        (temporary / "manifest.json").write_text(json.dumps(manifest | {"files": files}))
        for path in [*temporary.iterdir(), temporary]:
            fsync(path)
        final = self.folder / f"step-{step:06d}"
        if final.exists():  # a corrupt one of this step, after a resume from an older one
            self._hide(final)
        temporary.rename(final)
        fsync(self.folder)
        # The new checkpoint is complete. What cannot be tidied now is tidied after the next one.
        with contextlib.suppress(OSError):
            self._tidy(final)

    def discard(self, step: int) -> None:
        """Removes what a failed `write` left."""
        shutil.rmtree(self._temporary(step), ignore_errors=True)

    def newest(self) -> tuple[Path | None, Manifest, list[str]]:
        """The newest checkpoint that verifies, its manifest, and a note on each one skipped."""
        notes = [
            f"{p.name.removeprefix('.')} passed over: it was never finished"
            for p in sorted(self.folder.glob(".writing-*"))
        ]
        for path in reversed(self.finished()):
            try:
                return path, verified_manifest(path), notes
            except (OSError, ValueError, KeyError, TypeError) as error:
                self.corrupt.add(path.name)
                notes.append(f"{path.name} passed over: {error}")
        return None, {}, notes

    def _temporary(self, step: int) -> Path:
        return self.folder / f".writing-{step:06d}"

    def _hide(self, path: Path) -> None:
        """Renames a checkpoint that will be deleted: half deleted, it must not look like one."""
        hidden = self.folder / f".old-{path.name}"
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)

    def _tidy(self, newest: Path) -> None:
        """Links the newest and the best, and deletes all others but the last `keep`.

        A corrupt checkpoint counts as none of them, and is deleted only now that a newer one is
        complete.
        """
        complete = [
            p
            for p in self.finished()
            if p == newest or (p.name not in self.corrupt and step_of(p) < step_of(newest))
        ]
        losses = [(loss, p) for p in complete for loss in [validation_loss(p)] if loss is not None]
        best = min(losses, key=lambda pair: pair[0], default=(0.0, newest))[1]
        with contextlib.suppress(OSError):  # some file systems have no links; deletion goes on
            self._link("newest", newest)
            self._link("best", best)
        for path in set(self.finished()) - {best, *complete[-self.keep :]}:
            self._hide(path)
        for leftover in [*self.folder.glob(".old-*"), *self.folder.glob(".writing-*")]:
            shutil.rmtree(leftover, ignore_errors=True)

    def _link(self, name: str, target: Path) -> None:
        link = self.folder / f".{name}"
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        link.replace(self.folder / name)


def step_of(path: Path) -> int:
    return int(path.name[5:])


def verified_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint whose files have their recorded sizes and hashes.

    Raises OSError, KeyError, TypeError or ValueError where they do not.
    """
    manifest = json.loads((path / "manifest.json").read_text())
    for name, recorded in manifest["files"].items():
        set_activity(f"checking {path.name}")
        file = path / name
        if file.stat().st_size != recorded["bytes"] or sha256(file) != recorded["sha256"]:
            raise ValueError(f"{name} is not what was written")
    return manifest


def validation_loss(path: Path) -> float | None:
    """The validation loss in a checkpoint's manifest; None where it has none."""
    try:
        loss = json.loads((path / "manifest.json").read_text())["figures"]["eval/loss"]
        return loss if math.isfinite(loss) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
