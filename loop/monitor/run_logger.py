"""What a person sees of a run: lines, a progress bar, TensorBoard, `metrics.jsonl`, a report."""

import contextlib
import dataclasses
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from ..checkpoint.checkpointer import Checkpointer
from ..checkpoint.run_dir import (
    as_markdown,
    collect_versions,
    lines_to_keep,
    whole_lines,
    write_report,
)
from ..checkpoint.train_state import TrainState
from ..config.cli import printable
from ..config.schema import Config
from ..data.batch_plan import BatchPlan, PackingSpec, split_step
from ..data.dataset import TrainingData
from ..data.tokenization import Example
from ..distributed import timeline
from ..distributed.files import write_atomically
from ..distributed.stop import StopRequest
from ..distributed.world import Ranks
from ..evaluation.choosing import Choice
from ..generation.engine_choice import writer_cache_bytes
from ..generation.sharded import prompt_of
from ..kernels import check_results
from ..memory.breakdown import memory_breakdown
from ..memory.measure import PeakMemory, peak_gpu_bytes
from ..model.build import Execution
from ..optim.adamw import trainable_parameters
from .late_file import LateFile
from .mfu import build_mfu
from .step_timer import StepTimer
from .summary import describe_duration, describe_plan
from .tensorboard import TensorBoardLog

FLUSH_SECONDS = 10  # between two writes to TensorBoard's file
MINUTE = 60  # seconds between two lines where no terminal shows a progress bar


class RunLogger:
    """Writes on rank 0 and is silent on the others, so that the loop needs no `if`.

    A failed write, as on a full disk, is said once; what was to be written waits in memory.
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
        self.mfu = build_mfu(engine.module, model_config, ranks)
        self.timer = StepTimer(ranks.device)
        self.started = self.step_started = self.last_line = time.perf_counter()
        self.tokens = 0  # of the steps of this process
        self.start_time: dict[str, float] = {}  # seconds by part, up to the first step's end
        self.seconds = 0.0  # of its steps alone, without evaluation and saving
        self.largest_micro_batch = 0  # tokens, of this rank
        self.texts: dict[Path, str] = {}  # files that wait to be written
        self.failing = False  # the last write failed
        self.next_flush = 0.0  # of TensorBoard's file, on the monotonic clock
        with self._fail_alike():
            if self.on:
                self._open_files(validated=not state.validation_due)

    @contextlib.contextmanager
    def _fail_alike(self):
        """A context whose OSError on rank 0 is one on all ranks: the others would wait for it."""
        problem = None
        try:
            yield
        except OSError as error:
            problem = f"{self.folder} cannot be written: {error.strerror or error}"
        if problem := self.ranks.all_gather_json(problem)[0]:
            raise OSError(problem)

    def _open_files(self, validated: bool) -> None:
        """validated: nothing that belongs to `first_step` will be logged once more."""
        self.folder.chmod(0o700)  # a run on patients' data is its owner's alone
        settings = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
        write_atomically(self.folder / "config.yaml", settings)
        ds_config = json.dumps(self.execution.ds_config, indent=2)
        write_atomically(self.folder / "ds_config.json", ds_config)
        self.versions = collect_versions()
        write_atomically(self.folder / "versions.json", json.dumps(self.versions, indent=2))
        log = self.folder / "metrics.jsonl"
        lines = lines_to_keep(
            log.read_text(errors="replace") if log.exists() else "", self.first_step, validated
        )
        write_atomically(log, "".join(json.dumps(line) + "\n" for line in lines))
        self.log = LateFile(log)
        if not self.first_step:  # what is here is of a run that died before its first checkpoint
            shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)
            shutil.rmtree(self.folder / "samples", ignore_errors=True)
        self.clipped = sum(self._is_clipped(line.get("train/grad_norm", 0.0)) for line in lines)
        # TensorBoard's server ignores the first mark of a restart, so a new run writes one, too.
        purge = self.first_step + validated if self.first_step else 0
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
        train = data.reports["train"]
        valid = data.reports["valid"]
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
        self._write_text("data.json", json.dumps(reports, indent=1))

    def _log_plan(self, data: TrainingData, packing: PackingSpec) -> None:
        """The batch arithmetic, the planned learning rate, and a picture of the first step."""
        plan = self.plan
        max_tokens = self.execution.max_tokens
        rows = max_tokens // self.config.max_seq_len
        world_size = self.ranks.world_size
        text = describe_plan(plan, data.lengths, data.num_targets, self.config, world_size, rows)
        self.say(text)
        first = split_step(plan[0], data.lengths, world_size, packing)
        self.board.plan(plan, text, data.train, first, rows * self.config.max_seq_len)

    def _write_prompts(self, data: TrainingData, tokenizer) -> None:
        """What the sample notes are written from."""
        prompts = {
            e.id: tokenizer.decode(prompt_of(e), skip_special_tokens=True).strip()
            for e in data.samples
        }
        if prompts:
            self._write_text("samples/prompts.md", as_markdown(prompts))

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.on:
            with contextlib.suppress(OSError):  # the terminal may have gone away; the run goes on
                self.bar.write("\n".join(printable(line, 10**5) for line in text.split("\n")))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Scalars after `step` steps, to TensorBoard and as one line to metrics.jsonl."""
        if self.on and values:
            self.log.write(json.dumps({"step": step} | values).encode() + b"\n")
            self.board.scalars(step, values)
            self._write_out()

    def flush(self) -> None:
        """Makes safe what was logged: a run that resumes from the next checkpoint finds it."""
        if self.on:
            self.next_flush = 0.0
            self._write_out()
            with contextlib.suppress(OSError):
                self.log.sync()

    def _write_text(self, name: str, text: str) -> None:
        """A file of the run's folder; where it can't be written now, it is later."""
        self.texts[self.folder / name] = text
        self._write_out()

    def _write_out(self) -> None:
        """Writes what waits. That it fails is said once, and so is when it works again."""
        try:
            self.log.flush()
            if self.failing or time.monotonic() > self.next_flush:
                self.board.flush()
                self.next_flush = time.monotonic() + FLUSH_SECONDS
            for path in list(self.texts):
                path.parent.mkdir(exist_ok=True)
                write_atomically(path, self.texts[path])
                del self.texts[path]
        except OSError as error:
            if not self.failing:
                self.say(
                    f"not logged yet: {error.strerror or error} ({self.folder}); the run goes on, "
                    "and writes it when it can"
                )
            self.failing = True
            return
        if self.failing:
            lost = self.log.lost + self.board.lost
            gap = f", but for {lost:,} lines that memory could not hold" if lost else ""
            self.say(f"what could not be logged is written now{gap} ({self.folder})")
        self.failing = False

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
            self.say(f"first step  done after {timeline.describe(self.start_time)}")
        if step == self.first_step + 3:
            left = self.num_steps - step
            self.say(
                f"step {step}: {seconds:.2f} s, {tokens / seconds:,.0f} tokens/s; "
                f"{left:,} steps to go, about {describe_duration(left * seconds)}"
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
            estimate["copies for notes"] = writer_cache_bytes(self.engine.module)
            self.say(self.memory.describe_beside(estimate))

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
        self,
        state: TrainState,
        result,
        examples: Sequence[Example],
        step: Sequence[int],
        mine: list[list[int]],
    ) -> None:
        """Names the examples of a skipped step. Every rank must call it.

        Args:
            step: numbers of all examples of the step. They are named where no loss is NaN or inf.
            mine: those of each micro-batch of this rank; of those with such a loss all are named.
        """
        self.scalars(state.step, {"train/skipped_steps": state.skipped_steps})
        suspects = [examples[i].id for number in result.nonfinite for i in mine[number]]
        named = sum(self.ranks.all_gather_json(suspects), []) or [examples[i].id for i in step]
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
            for key, note in notes.items():
                self.board.note(step, key, note)
            self._write_text(f"samples/step-{step:06d}.md", as_markdown(notes))

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

        That is `metrics` and those of all steps, the steps before a resume included. Every rank
        must call it. Raises OSError on all where rank 0 can't write.
        """
        report: dict = {}
        with self._fail_alike():
            if self.on:
                report = self._close_files(metrics)
        return report

    def _close_files(self, metrics: dict) -> dict:
        with contextlib.suppress(OSError):
            self.bar.close()
        self.flush()
        self.log.close()
        self.board.close(self.num_steps)
        lines = whole_lines((self.folder / "metrics.jsonl").read_text(errors="replace"))
        losses = [line["train/loss"] for line in lines if "train/loss" in line]
        if losses:
            metrics = {"train/loss_first": losses[0], "train/loss_last": losses[-1]} | metrics
        if self.seconds:
            metrics = {
                "train/tokens_per_second": self.tokens / self.seconds,
                "seconds": time.perf_counter() - self.started,
            } | metrics
        metrics |= {"time": timeline.so_far(), "time_to_first_step": self.start_time}
        metrics |= {"kernel_tests": check_results.outcomes}
        return write_report(
            self.folder, {"steps": len(losses), "planned_steps": self.num_steps} | metrics
        )
