"""Elastic checkpoints: saved as full tensors, so that any number of ranks can resume from them."""

import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from ..config.schema import Config, ConfigError
from ..data.batch_plan import BatchPlan
from ..distributed.seeding import get_rng_state, set_rng_state
from ..distributed.timeline import timed
from ..distributed.watchdog import set_activity
from ..distributed.world import Ranks
from ..evaluation.choosing import Choice
from ..optim.adamw import trainable_parameters
from ..zero3.optimizer_state import (
    MASTER,
    adam_step,
    create_adam_state,
    gather_full_state,
    scatter_full_tensor,
    tensor_kinds,
)
from .identity import RunIdentity
from .store import CheckpointStore, read_masters, step_of
from .train_state import TrainState


class Checkpointer:
    """Saves a run's state and finds and restores the one to resume from.

    Every rank must call each method: all of them take part in its collectives.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, config: Config, identity: RunIdentity) -> None:
        """Raises ConfigError where `monitor.best` is no metric that can choose."""
        self.run_dir = run_dir
        self.ranks = ranks
        self.config = config
        self.identity = identity
        self.choice = Choice.of(config)
        self.store = CheckpointStore(run_dir, config.run.keep_checkpoints, self.choice)
        # Set by `find_latest`.
        self.plan: BatchPlan
        self.path: Path | None = None  # of the checkpoint that the run resumes from
        self.manifest: dict = {}
        self.notes: list[str] = []  # on skipped checkpoints and changed settings
        self.start_note = ""  # where the run starts

    def find_latest(self, plan: BatchPlan) -> TrainState:
        """The state of the newest complete checkpoint on rank 0's disk; a new one without any.

        Raises ConfigError on all ranks where one of them cannot read the file; where checkpoints
        exist and none is complete, as a person must say that all of that work is to be done again;
        and where the checkpoint belongs to another run (`RunIdentity.check_compatible`).
        """
        found: list = [None, {}, []]  # name of the checkpoint, its manifest, notes
        if self.ranks.is_main:
            path, manifest, notes = self.store.newest()
            self.store.link_anew()
            found = [path.name if path else None, manifest, notes]
        name, manifest, notes = self.ranks.all_gather_json(found)[0]
        path = self.store.folder / name if name else None
        if self.ranks.any(path is not None and not (path / "manifest.json").is_file()):
            raise ConfigError(
                f"{path}: not every rank can read it; "
                "run.dir must be a folder that all machines share"
            )
        if self.ranks.any(bool(self.store.corrupt) and path is None):
            raise ConfigError(
                f"{self.store.folder}: no checkpoint is whole ({'; '.join(notes)}); "
                "repair one, or start over with run.resume=false"
            )
        self.plan = plan
        self.path = path
        self.manifest = manifest
        self.notes = notes
        if path:
            force = self.config.run.resume == "force"
            self.notes += self.identity.check_compatible(path, manifest, plan, force)
        self.start_note = f"resumed from {path}" if path else f"run folder  {self.run_dir}"
        return TrainState.from_manifest(self.config.run, manifest, self.choice)

    def restore(self, engine) -> None:
        """Puts the checkpoint of `find_latest` into the engine, right after `deepspeed.initialize`.

        Masters, optimizer state and generators. Nothing is done in a new run. Raises ConfigError
        naming the first tensor that does not belong to this model.
        """
        if not self.path:
            return
        create_adam_state(engine, self.manifest["optimizer_step"])
        parameters: dict[str, Any] = dict(trainable_parameters(engine.module))
        missing = {f"{name}.{kind}" for name in parameters for kind in tensor_kinds(engine)}
        for file_name in sorted(self.manifest["files"]):
            with safe_open(self.path / file_name, "pt") as file:
                for key in file.keys():
                    name, kind = key.rsplit(".", 1)
                    shape = tuple(file.get_slice(key).get_shape())
                    if key not in missing or shape != tuple(parameters[name].ds_shape):
                        raise ConfigError(f"{self.path}: its {key} is not this model's")
                    scatter_full_tensor(parameters[name], kind, file.get_tensor(key), self.ranks)
                    missing.remove(key)
        if missing:
            raise ConfigError(f"{self.path}: has no {min(missing)}")
        # With another number of ranks the generators keep their seeds: each belongs to one rank.
        if len(self.manifest["rng"]) == self.ranks.world_size:
            set_rng_state(self.manifest["rng"][self.ranks.rank])

    def restore_best(self, engine, state: TrainState, logger) -> None:
        """With run.export=best: puts the weights of the best checkpoint into the engine.

        `state.exported_step` tells whose weights the engine holds then. Only the weights are
        restored, so nothing can be trained after that. Without a validated checkpoint, the last
        step's weights stay. Every rank must call it, at the end of the run.
        """
        state.exported_step = state.step
        if self.config.run.export != "best":
            return
        set_activity("restoring the best checkpoint")
        found: list = [None, [], None]
        if self.ranks.is_main:
            path, manifest = self.store.best()
            if path:
                value = self.choice.value_of_checkpoint(manifest)
                found = [path.name, sorted(manifest["files"]), value]
        name, files, value = self.ranks.all_gather_json(found)[0]
        if not name:
            logger.say("exported    the last step's weights: no validated checkpoint is there")
            return
        path = self.store.folder / name
        if step_of(path) != state.step:
            # A GPU may still prefetch for a step that won't come.
            engine.empty_partition_cache()
            parameters: dict[str, Any] = dict(trainable_parameters(engine.module))
            for key, tensor in read_masters(path, files):
                scatter_full_tensor(parameters[key], MASTER, tensor, self.ranks)
        state.exported_step = step_of(path)
        logger.say(
            f"exported    the weights of step {state.exported_step}, the best by {self.choice}: "
            f"{value:.4f}"
        )

    def save_if_due(self, engine, state: TrainState, stopping: bool, logger) -> None:
        """Saves where the configuration says so, and before the run ends. Every rank must call it.

        The best validation so far is saved as well, where its weights may be wanted: with
        run.export=best, or where monitor.best names a metric of notes.
        """
        run = self.config.run
        wanted = run.export == "best" or self.choice.is_of_notes
        due = state.step == len(self.plan) or state.step % run.save_steps == 0
        if due or stopping or state.ended or (wanted and state.is_best):
            self.save(engine, state, logger)

    def amend(self, state: TrainState, logger) -> None:
        """Adds the validation that was due after a resume to the checkpoint that lacks it.

        So that checkpoint can be the best, as in a run that was not interrupted.
        """
        if not self.path or not self.ranks.is_main:
            return
        lacks_validation = self.manifest.get("figures") is None
        if lacks_validation and not state.validation_due:
            try:
                self.store.amend(self.path, state.to_manifest())
            except OSError as error:
                logger.say(f"{self.path}: its validation is not noted there: {error}")

    @timed("checkpoints")
    def save(self, engine, state: TrainState, logger) -> None:
        """Writes a checkpoint of `state`. A failed write is said, and the run goes on.

        What was logged so far is made safe first, so that the curve has no gap after a resume.
        """
        started = time.perf_counter()
        logger.flush()
        problem = self._write(engine, state)
        if problem:
            logger.say(problem)
        else:
            logger.scalars(state.step, {"train/save_seconds": time.perf_counter() - started})

    def _write(self, engine, state: TrainState) -> str | None:
        """None, or what went wrong: a full disk must not end a run that has older checkpoints."""
        set_activity("saving a checkpoint")
        if adam_step(engine) == 0:  # every step so far was skipped: Adam has no state yet
            create_adam_state(engine, 0)
        manifest = state.to_manifest() | {
            "optimizer_step": adam_step(engine),
            "rng": self.ranks.all_gather_json(get_rng_state()),
            "identity": self.identity.at_step(self.plan, state.step),
            "config": self.config.model_dump(mode="json"),
            "versions": self.identity.versions,
        }
        tensor_files = gather_full_state(engine, self.ranks)
        problem = None
        if self.ranks.is_main:
            try:
                self.store.write(state.step, tensor_files, manifest)
            except (OSError, SafetensorError) as error:  # safetensors' own error for a full disk
                self.store.discard(state.step)
                problem = (
                    f"checkpoint of step {state.step} not written: {error} "
                    f"({self.store.folder}); older ones stay"
                )
        # All ranks take part in every gather: the others here, and rank 0 after a failure.
        for _ in tensor_files:
            pass
        dist.barrier()
        return problem

    def diverged_message(self, state: TrainState) -> str:
        """What to tell a person whose run was given up."""
        return (
            f"{state.skipped_in_a_row} steps in a row were skipped; the state of step {state.step} "
            f"is saved in {self.store.folder}. Look at the examples named above, or lower lr"
        )
