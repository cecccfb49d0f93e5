"""What a person sees of a run: lines, a progress bar, TensorBoard, `metrics.jsonl`, a report."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
import time
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from ..checkpoint.checkpointer import Checkpointer
from ..checkpoint.run_dir import as_markdown, lines_to_keep, versions, write_report
from ..checkpoint.train_state import TrainState
from ..config.schema import Config
from ..data.batch_plan import BatchPlan, PackingSpec, split_step
from ..data.dataset import TrainingData
from ..distributed import timeline
from ..distributed.files import write_atomically
from ..distributed.stop import StopRequest
from ..distributed.world import Ranks
from ..evaluation.choosing import Choice
from ..generation.sharded import prompt_of
from ..memory.breakdown import memory_breakdown
from ..memory.measure import PeakMemory, peak_gpu_bytes
from ..model.build import Execution
from ..optim.adamw import trainable_parameters
from .mfu import utilisation
from .step_timer import StepTimer
from .summary import describe_plan
from .tensorboard import TensorBoardLog

MINUTE = 60  # seconds between two lines where no terminal shows a progress bar


class RunLogger:
    """Writes on rank 0 and is silent on the others, so that the loop needs no `if`.

    A failed write, as on a full disk, costs a line of the log and not the run.
    """

    def __init__(
        self,
        config: Config,
        execution: Execution,
        engine,
        ranks: Ranks,
        state: TrainState,
        plan: BatchPlan,
        model_config,
        memory: PeakMemory,
    ) -> None:
        """state: where the run starts; memory: made before the model was loaded."""
        self.on = ranks.is_main
        self.config = config
        self.execution = execution
        self.engine = engine
        self.ranks = ranks
        self.folder = config.folder
        self.first_step = state.step
        self.plan = plan
        self.num_steps = len(plan)
        self.memory = memory
        self.mfu = utilisation(engine.module, model_config, ranks)
        self.timer = StepTimer(ranks.device)
        self.started = self.step_started = self.last_line = time.perf_counter()
        self.tokens = 0  # of the steps of this process
        self.start_time: dict[str, float] = {}  # seconds by part, up to the first step's end
        self.seconds = 0.0  # of its steps alone, without evaluation and saving
        self.largest_micro_batch = 0  # tokens, of this rank
        if self.on:
            self._open_files(validated=not state.validation_due)

    def _open_files(self, validated: bool) -> None:
        """validated: nothing that belongs to `first_step` will be logged once more."""
        self.folder.chmod(0o700)  # a run on patients' data is its owner's alone
        settings = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
        (self.folder / "config.yaml").write_text(settings)
        ds_config = json.dumps(self.execution.ds_config, indent=2)
        (self.folder / "ds_config.json").write_text(ds_config)
        self.versions = versions()
        (self.folder / "versions.json").write_text(json.dumps(self.versions, indent=2))
        log = self.folder / "metrics.jsonl"
        lines = lines_to_keep(log.read_text() if log.exists() else "", self.first_step, validated)
        write_atomically(log, "".join(json.dumps(line) + "\n" for line in lines))
        self.log = log.open("a")
        if not self.first_step:  # what is here is of a run that died before its first checkpoint
            shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)
            shutil.rmtree(self.folder / "samples", ignore_errors=True)
        self.clipped = sum(self._is_clipped(line.get("train/grad_norm", 0.0)) for line in lines)
        purge = self.first_step + validated if self.first_step else None
        tags = {key for line in lines for key in line}
        self.board = TensorBoardLog(
            self.folder / "tensorboard", self.config, self.first_step, purge, tags
        )
        if not validated:
            for line in lines:
                if line["step"] == self.first_step:
                    self.board.scalars(self.first_step, line)
        self.bar = tqdm(
            total=self.num_steps,
            initial=self.first_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=1,
            disable=not sys.stderr.isatty(),
        )

    def log_start(
        self,
        data: TrainingData,
        tokenizer,
        packing: PackingSpec,
        checkpointer: Checkpointer,
        warnings: list[str],
    ) -> None:
        """The run in advance: machine, base, data, plan, and what a person should know."""
        if not self.on:
            return
        parameters: list[Any] = [p for _, p in trainable_parameters(self.engine.module)]
        trained = sum(p.ds_numel for p in parameters)  # ZeRO-3 gives each a ds_numel
        train, valid = data.reports["train"], data.reports["valid"]
        start = f", on from {self.config.adapter}" if self.config.adapter else ""
        self.say(
            f"machine     {self.ranks.world_size} rank(s) on {self.versions['device']}, "
            f"{self.execution.description}\n"
            f"base        {self.config.base}: {self.config.method}, "
            f"{trained:,} trainable parameters{start}\n"
            f"examples    {len(data.train):,} of {train.rows:,} to train on, "
            f"{len(data.valid):,} of {valid.rows:,} held out"
        )
        self._log_data_reports(data)
        self._log_plan(data, packing)
        notes = [*checkpointer.notes, *warnings, checkpointer.start_note]
        for note in filter(None, notes):
            self.say(note)
        self._write_prompts(data, tokenizer)

    def _log_data_reports(self, data: TrainingData) -> None:
        """Which rows were left out or changed, and why: some said, all in data.json."""
        for split, report in data.reports.items():
            for line in report.lines(split, self.config.max_seq_len):
                self.say(line)
        reports = {split: dataclasses.asdict(report) for split, report in data.reports.items()}
        with self._survive_full_disk():
            (self.folder / "data.json").write_text(json.dumps(reports, indent=1))

    def _log_plan(self, data: TrainingData, packing: PackingSpec) -> None:
        """The batch arithmetic, the planned learning rate, and a picture of the first step."""
        plan, max_tokens = self.plan, self.execution.max_tokens
        rows = max_tokens // self.config.max_seq_len
        world_size = self.ranks.world_size
        text = describe_plan(plan, data.lengths, data.num_targets, self.config, world_size, rows)
        self.say(text)
        first = split_step(plan[0], data.lengths, world_size, packing)
        with self._survive_full_disk():
            self.board.plan(plan, text, data.train, first, rows * self.config.max_seq_len)

    def _write_prompts(self, data: TrainingData, tokenizer) -> None:
        """What the sample notes are written from."""
        prompts = {
            e.id: tokenizer.decode(prompt_of(e), skip_special_tokens=True).strip()
            for e in data.samples
        }
        if prompts:
            with self._survive_full_disk():
                (self.folder / "samples").mkdir(exist_ok=True)
                (self.folder / "samples" / "prompts.md").write_text(as_markdown(prompts))

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.on:
            with contextlib.suppress(OSError):  # the terminal may have gone away; the run goes on
                self.bar.write(text)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Scalars after `step` steps, to TensorBoard and as one line to metrics.jsonl."""
        if self.on and values:
            with self._survive_full_disk():
                self.log.write(json.dumps({"step": step} | values) + "\n")
                self.log.flush()
                self.board.scalars(step, values)

    def flush(self) -> None:
        """Makes safe what was logged: a run that resumes from the next checkpoint finds it."""
        if self.on:
            with self._survive_full_disk():
                os.fsync(self.log.fileno())
                self.board.flush()

    @contextlib.contextmanager
    def _survive_full_disk(self):
        try:
            yield
        except OSError as error:
            self.say(f"not logged: {error} ({self.folder})")
            with contextlib.suppress(OSError):
                self.board.reopen()

    def _is_clipped(self, grad_norm: float) -> bool:
        return math.isfinite(grad_norm) and grad_norm > self.config.max_grad_norm

    def start_step(self, step: int) -> None:
        """A step's time begins here; evaluation, sampling and saving are not part of it."""
        if step == self.first_step:
            self.memory.begin()
        timeline.enter("first step" if step == self.first_step else "steps")
        self.step_started = time.perf_counter()
        self.timer.start()

    def log_step(
        self,
        state: TrainState,
        result,
        lr: float,
        lengths: np.ndarray,
        num_targets: int,
        micro_batches: list,
    ) -> None:
        """The step that `state.step` now counts.

        Args:
            result: train_step's StepResult.
            lengths: int [n], tokens of each example of the step.
            num_targets: the step's supervised tokens.
            micro_batches: this rank's.
        """
        step = state.step
        timeline.enter(timeline.OTHER)
        seconds = time.perf_counter() - self.step_started
        phases = self.timer.stop()
        tokens = int(lengths.sum())
        self.tokens += tokens
        self.seconds += seconds
        largest = max(batch.input_ids.numel() for batch in micro_batches)
        self.largest_micro_batch = max(self.largest_micro_batch, largest)
        if step == self.first_step + 1:
            self.start_time = timeline.so_far()
            self.say(f"start       {timeline.describe(self.start_time)}")
        if step == self.first_step + 3:
            left = self.num_steps - step
            self.say(
                f"step {step}: {seconds:.2f} s, {tokens / seconds:,.0f} tokens/s; "
                f"{left:,} steps to go, about {left * seconds / 60:,.0f} min"
            )
        values = {
            "train/loss": result.loss,
            "train/grad_norm": result.grad_norm,
            "train/lr": lr,
            "train/tokens_per_second": tokens / seconds,
        }
        if self.ranks.device.type == "cuda":
            values["train/gpu_memory_gib"] = peak_gpu_bytes() / 2**30
        values |= self.mfu(lengths, num_targets, seconds)
        values |= {f"time/{phase}": spent for phase, spent in phases.items()}
        if self.on:
            self._write_step(step, values)
        if step == min(self.first_step + 3, self.num_steps):
            estimate = self.execution.estimate_memory(self.largest_micro_batch)
            self.say(self.memory.beside(estimate))

    def _write_step(self, step: int, values: dict[str, float]) -> None:
        """A step's values to the logs, and the main ones to the progress bar."""
        is_first_or_last = step in (self.first_step + 1, self.num_steps)
        if is_first_or_last or step % self.config.monitor.eval_steps == 0:  # it hardly changes
            values = values | memory_breakdown(self.engine, self.ranks)
        self.clipped += self._is_clipped(values["train/grad_norm"])
        self.scalars(step, values | {"train/clipped_steps": self.clipped})
        line = (
            f"loss {values['train/loss']:.4f}, norm {values['train/grad_norm']:.2f}, "
            f"lr {values['train/lr']:.2e}, {values['train/tokens_per_second']:,.0f} tokens/s"
        )
        with contextlib.suppress(OSError):
            self.bar.set_postfix_str(line, refresh=False)
            self.bar.update()
        if self.bar.disable and time.perf_counter() - self.last_line > MINUTE:
            self.last_line = time.perf_counter()
            self.say(f"step {step} of {self.num_steps}: {line}")

    def log_skipped_step(
        self, state: TrainState, result, nonfinite_ids: list[str], step_ids: list[str]
    ) -> None:
        """Names the examples of a skipped step. Every rank must call it.

        Args:
            nonfinite_ids: examples of this rank's micro-batches whose loss is NaN or inf.
            step_ids: all examples of the step, for a step where no loss is.
        """
        self.scalars(state.step, {"train/skipped_steps": state.skipped_steps})
        named = sum(self.ranks.all_gather_json(nonfinite_ids), []) or step_ids
        self.say(
            f"step {state.step}: loss {result.loss:.4f}, gradient norm {result.grad_norm:.4f}, "
            f"the step was skipped on all ranks; examples {', '.join(named)}"
        )

    def log_validation(self, step: int, metrics: dict[str, float], notes: dict[str, str]) -> None:
        """Validation metrics after `step` steps, and sample notes by id."""
        self.scalars(step, metrics)
        choice = Choice.of(self.config)
        value = metrics.get(choice.key, math.nan)
        also = f", {choice} {value:.4f}" if choice.is_of_notes else ""
        self.say(
            f"step {step}: validation loss {metrics['eval/loss']:.4f}, "
            f"perplexity {metrics['eval/perplexity']:.2f}{also}"
        )
        if self.on and notes:
            with self._survive_full_disk():
                (self.folder / "samples" / f"step-{step:06d}.md").write_text(as_markdown(notes))
                for key, note in notes.items():
                    self.board.note(step, key, note)

    def finish(self, state: TrainState, exported: dict, stop: StopRequest) -> dict:
        """Closes the files of a run that ends well, and returns what report.json holds now."""
        metrics = {"fill": self.plan.fill} | exported | (state.eval_metrics or {})
        if exported:
            metrics["exported_step"] = state.exported_step
        metrics["best"] = state.to_manifest()["best"]
        early = state.out_of_patience and state.step < self.num_steps
        since = f"since step {state.best_step}" if state.best_step else "at all"
        why = f"run.patience={self.config.run.patience}: no better {state.choice} {since}"
        metrics["ended_early"] = why if early else None
        report = self.close(metrics)
        if early:
            self.say(f"step {state.step}: the end, by {why}")
        elif report and report["steps"] < self.num_steps:
            steps = report["steps"]
            saved = f"saved after step {steps}" if steps else "before the first step"
            self.say(
                f"asked to stop ({stop.reason or 'another rank was'}): {saved}; "
                "the same command goes on from there (with run.resume=true)"
            )
        return report

    def close(self, metrics: dict) -> dict:
        """Closes the files and returns what report.json holds now; {} on other ranks than 0.

        That is `metrics` and those of all steps, the steps before a resume included.
        """
        if not self.on:
            return {}
        with self._survive_full_disk():
            self.bar.close()
            self.board.close(self.num_steps)
            self.log.close()
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        losses = [line["train/loss"] for line in lines if "train/loss" in line]
        if losses:
            metrics = {"train/loss_first": losses[0], "train/loss_last": losses[-1]} | metrics
        if self.seconds:
            metrics = {
                "train/tokens_per_second": self.tokens / self.seconds,
                "seconds": time.perf_counter() - self.started,
            } | metrics
        metrics |= {"time": timeline.so_far(), "time_to_first_step": self.start_time}
        return write_report(
            self.folder, {"steps": len(losses), "planned_steps": self.num_steps} | metrics
        )
