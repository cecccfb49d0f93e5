"""Checkpoints on disk: written atomically, verified when they are read, deleted when they are old.

`checkpoints/step-000200/` holds `state-00000.safetensors`, ... and `manifest.json` with the size
and SHA-256 of each file. Nothing is pickled. A checkpoint is written under another name, fsynced
and renamed, so one with its final name is complete. `newest` and `best` are symbolic links.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..distributed.files import fsync, sha256
from ..distributed.watchdog import set_activity
from ..evaluation.choosing import Choice
from ..zero3.optimizer_state import MASTER

# What reading a damaged checkpoint raises.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
SEAL = {"sealed", "sha256"}  # of a manifest
# Of JSON's types; `TrainState.to_manifest` and `Checkpointer.save` say what is in it.
Manifest = dict


class CheckpointStore:
    """The last `keep` checkpoints of a run directory, and the one of the best validation."""

    def __init__(self, run_dir: Path, keep: int, choice: Choice = Choice()) -> None:
        """choice: what validations are judged by."""
        self.folder = run_dir / "checkpoints"
        self.keep = keep
        self.choice = choice
        self.corrupt: set[str] = set()  # names of checkpoints that failed verification

    def finished(self) -> list[Path]:
        """All checkpoints with a final name, oldest first."""
        paths = filter(is_checkpoint, self.folder.glob("step-*"))
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
        (temporary / "manifest.json").write_text(sealed(manifest | {"files": files}))
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
        notes += [
            f"{ascii(p.name)[:60]} passed over: is no name of a checkpoint"
            for p in sorted(self.folder.glob("step-*"))
            if not is_checkpoint(p)
        ]
        for path in reversed(self.finished()):
            try:
                return path, verified_manifest(path), notes
            except UNREADABLE as error:
                self.corrupt.add(path.name)
                notes.append(f"{path.name} passed over: {error}")
        return None, {}, notes

    def best(self) -> tuple[Path | None, Manifest]:
        """The best checkpoint among those that verify, and its manifest; (None, {}) without one.

        Only a validated one can be the best. Of equal ones it is the earliest.
        """
        while path := self._best_of([p for p in self.finished() if p.name not in self.corrupt]):
            try:
                return path, verified_manifest(path)
            except UNREADABLE:
                self.corrupt.add(path.name)
        return None, {}

    def amend(self, path: Path, changes: Manifest) -> None:
        """Changes entries in the manifest of a checkpoint, atomically, and links the best anew.

        Raises OSError when the disk is full; the checkpoint is what it was then.
        """
        manifest = json.loads((path / "manifest.json").read_text())
        temporary = path / ".manifest.json"
        temporary.write_text(sealed(manifest | changes))
        fsync(temporary)
        temporary.replace(path / "manifest.json")
        fsync(path)
        self.link_anew()

    def _best_of(self, paths: list[Path]) -> Path | None:
        """The best of some checkpoints, oldest first; None where none was validated."""
        best = None
        best_value = None
        for path in paths:
            value = value_of(path, self.choice)
            if self.choice.is_better(value, best_value):
                best = path
                best_value = value
        return best

    def _temporary(self, step: int) -> Path:
        return self.folder / f".writing-{step:06d}"

    def _hide(self, path: Path) -> None:
        """Renames a checkpoint that will be deleted: half deleted, it must not look like one."""
        hidden = self.folder / f".old-{path.name}"
        _remove(hidden)
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
        best = self._link_all(complete)
        for path in set(self.finished()) - {best, *complete[-self.keep :]}:
            self._hide(path)
        for leftover in [*self.folder.glob(".old-*"), *self.folder.glob(".writing-*")]:
            _remove(leftover)

    def link_anew(self) -> None:
        """Makes `newest` and `best` true: a kill may have fallen between a checkpoint and them."""
        if complete := [p for p in self.finished() if p.name not in self.corrupt]:
            self._link_all(complete)

    def _link_all(self, complete: list[Path]) -> Path:
        """Links the newest and the best of some checkpoints, oldest first. Returns the best."""
        newest = complete[-1]
        best = self._best_of(complete) or newest
        with contextlib.suppress(OSError):  # some file systems have no links
            self._link("newest", newest)
            self._link("best", best)
        return best

    def _link(self, name: str, target: Path) -> None:
        link = self.folder / f".{name}"
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        link.replace(self.folder / name)


def _remove(path: Path) -> None:
    """Removes a folder; of a link to one elsewhere, the link alone."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def is_checkpoint(path: Path) -> bool:
    """True for the name of a finished checkpoint; `isdigit` takes digits of other scripts."""
    return bool(re.fullmatch("step-[0-9]{1,9}", path.name))


def step_of(path: Path) -> int:
    return int(path.name[5:])


def sealed(manifest: Manifest) -> str:
    """The manifest as JSON, with a hash of all that it says."""
    manifest = {key: value for key, value in manifest.items() if key not in SEAL}
    return json.dumps(manifest | {"sealed": True, "sha256": _hash_of(manifest)})


def _hash_of(manifest: Manifest) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def verified_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint that is what was written, as its files are.

    Those of older runs have no hash of their own, of their files alone. Raises one of UNREADABLE
    where something differs.
    """
    manifest = json.loads((path / "manifest.json").read_text())
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError("manifest.json is not what was written")
    # One changed byte can't take away both keys.
    if SEAL & manifest.keys():
        facts = {key: value for key, value in manifest.items() if key not in SEAL}
        if manifest.get("sha256") != _hash_of(facts):
            raise ValueError("manifest.json is not what was written")
    if is_checkpoint(path) and manifest.get("step") != step_of(path):
        raise ValueError(f"manifest.json is of step {str(manifest.get('step'))[:20]}")
    for name, recorded in manifest["files"].items():
        set_activity(f"checking {path.name}")
        file = path / name
        if Path(name).name != name or file.is_symlink():
            raise ValueError(f"{name[:60]!r} is no file of the checkpoint's own")
        if file.stat().st_size != recorded["bytes"] or sha256(file) != recorded["sha256"]:
            raise ValueError(f"{name} is not what was written")
    return manifest


def read_masters(path: Path, files: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, fp32 weight) of each trained weight of a checkpoint, one at a time.

    files: of its manifest.
    """
    for file_name in files:
        with safe_open(path / file_name, "pt") as file:
            for key in file.keys():
                name, kind = key.rsplit(".", 1)
                if kind == MASTER:
                    yield name, file.get_tensor(key)


def value_of(path: Path, choice: Choice) -> float | None:
    """What a checkpoint's validation is judged by; None where it has no such finite number."""
    try:
        return choice.value_of_checkpoint(json.loads((path / "manifest.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
