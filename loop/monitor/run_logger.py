"""What a person sees of a run: a few lines before it, a progress bar, TensorBoard, `metrics.jsonl`, a summary."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
import time

import numpy as np
import yaml
from tqdm import tqdm

from ..checkpoint.run_dir import as_markdown, lines_to_keep, versions, write_report
from ..config.schema import Config
from ..data.batch_plan import BatchPlan
from ..data.report import DatasetReport
from ..data.tokenization import Example
from ..distributed.files import write_atomically
from ..distributed.world import Ranks
from ..memory.breakdown import memory_breakdown
from ..memory.measure import peak_gpu_bytes
from .step_timer import StepTimer
from .summary import describe_plan
from .tensorboard import TensorBoardLog


class RunLogger:
    """Writes on rank 0 and is silent on the others, so that the loop needs no `if`."""

    def __init__(
        self,
        config: Config,
        ds: dict,
        engine,
        ranks: Ranks,
        first_step: int,
        num_steps: int,
        mfu,
        evaluated: bool = True,
    ) -> None:
        """mfu: what mfu.utilisation gave. evaluated: nothing that belongs to `first_step` will be logged once more."""
        self.on, self.config, self.folder, self.engine, self.ranks = (
            ranks.is_main,
            config,
            config.folder,
            engine,
            ranks,
        )
        self.first_step, self.num_steps, self.mfu, self.timer = (
            first_step,
            num_steps,
            mfu,
            StepTimer(ranks.device),
        )
        self.started = self.last = self.said = time.perf_counter()
        self.tokens, self.seconds = 0, 0.0  # of the steps alone, without evaluation and saving
        if not self.on:
            return
        self.folder.chmod(0o700)  # a run on patients' data is its owner's alone
        (self.folder / "config.yaml").write_text(
            yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        )
        (self.folder / "ds_config.json").write_text(json.dumps(ds, indent=2))
        (self.folder / "versions.json").write_text(json.dumps(versions(), indent=2))
        log = self.folder / "metrics.jsonl"
        lines = lines_to_keep(log.read_text() if log.exists() else "", first_step, evaluated)
        write_atomically(log, "".join(json.dumps(line) + "\n" for line in lines))
        self.log = log.open("a")
        if not first_step:  # what is here is of a run that died before its first checkpoint
            shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)
            shutil.rmtree(self.folder / "samples", ignore_errors=True)
        self.clipped = sum(self._is_clipped(line.get("train/grad_norm", 0.0)) for line in lines)
        purge, tags = (
            first_step + evaluated if first_step else None,
            {key for line in lines for key in line},
        )
        self.board = TensorBoardLog(self.folder / "tensorboard", config, first_step, purge, tags)
        if not evaluated:
            for line in (line for line in lines if line["step"] == first_step):
                self.board.scalars(first_step, line)
        self.bar = tqdm(
            total=num_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=1,
            disable=not sys.stderr.isatty(),
        )

    def accounts(self, accounts: dict[str, DatasetReport]) -> None:
        """Which rows were left out or changed and why: said, and whole in data.json."""
        if self.on:
            for split, account in accounts.items():
                for line in account.lines(split, self.config.max_seq_len):
                    self.say(line)
            with self.carry_on():
                (self.folder / "data.json").write_text(
                    json.dumps({k: dataclasses.asdict(a) for k, a in accounts.items()}, indent=1)
                )

    def plan(
        self,
        plan: BatchPlan,
        examples: list[Example],
        micro_batch_size: int,
        first: list[list[list[int]]],
    ) -> None:
        """The run in advance: said, and in TensorBoard as text, histograms, the whole curve of the learning rate and a picture of the `first` cut."""
        if self.on:
            lengths, targets = (
                np.array([len(e) for e in examples]),
                np.array([e.num_targets for e in examples]),
            )
            text = describe_plan(
                plan, lengths, targets, self.config, self.ranks.world_size, micro_batch_size
            )
            self.say(text)
            with self.carry_on():
                self.board.plan(
                    plan, text, examples, first, micro_batch_size * self.config.max_seq_len
                )

    def say(self, text: str) -> None:
        if self.on:
            with contextlib.suppress(OSError):  # the terminal may have gone away; the run goes on
                self.bar.write(text)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Scalars after `step` steps, to TensorBoard and as one line to metrics.jsonl."""
        if self.on and values:
            with self.carry_on():
                self.log.write(json.dumps({"step": step} | values) + "\n")
                self.log.flush()
                self.board.scalars(step, values)

    def flush(self) -> None:
        """Before a checkpoint: a run that goes on from it finds all that was logged up to it, even after a power cut."""
        if self.on:
            with self.carry_on():
                os.fsync(self.log.fileno())
                self.board.flush()

    @contextlib.contextmanager
    def carry_on(self):
        """A full disk costs a line of the log, said aloud, and not the run."""
        try:
            yield
        except OSError as error:
            self.say(f"not logged: {error} ({self.folder})")
            with contextlib.suppress(OSError):
                self.board.reopen()

    def _is_clipped(self, grad_norm: float) -> bool:
        return math.isfinite(grad_norm) and grad_norm > self.config.max_grad_norm

    def step(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        lr: float,
        lengths: np.ndarray,
        num_targets: int,
    ) -> None:
        """One finished step: its loss (nats a supervised token), gradient norm before clipping, lr, its examples' lengths, its targets."""
        seconds, parts, tokens = (
            time.perf_counter() - self.last,
            self.timer.stop(),
            int(lengths.sum()),
        )
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        if step == self.first_step + 3:
            left = self.num_steps - step
            self.say(
                f"step {step}: {seconds:.2f} s, {tokens / seconds:,.0f} tokens/s; {left:,} steps to go, about {left * seconds / 60:,.0f} min"
            )
        values = {
            "train/loss": loss,
            "train/grad_norm": grad_norm,
            "train/lr": lr,
            "train/tokens_per_second": tokens / seconds,
        }
        if self.ranks.device.type == "cuda":
            values["train/gpu_memory_gib"] = peak_gpu_bytes() / 2**30
        values |= self.mfu(lengths, num_targets, seconds) | {
            f"time/{part}": spent for part, spent in parts.items()
        }
        if self.on:
            if (
                step in (self.first_step + 1, self.num_steps)
                or step % self.config.monitor.eval_steps == 0
            ):  # it hardly changes
                values |= memory_breakdown(self.engine, self.ranks)
            self.clipped += self._is_clipped(grad_norm)
            self.scalars(step, values | {"train/clipped_steps": self.clipped})
            figures = f"loss {loss:.4f}, norm {grad_norm:.2f}, lr {lr:.2e}, {tokens / seconds:,.0f} tokens/s"
            with contextlib.suppress(OSError):
                self.bar.set_postfix_str(figures, refresh=False)
                self.bar.update()
            if (
                self.bar.disable and time.perf_counter() - self.said > 60
            ):  # a file keeps no bar: a line a minute
                self.said = time.perf_counter()
                self.say(f"step {step} of {self.num_steps}: {figures}")

    def start_step(self) -> None:
        """A step's time begins here; evaluation, sampling and saving are not part of it."""
        self.last = time.perf_counter()
        self.timer.start()

    def notes(self, step: int, notes: dict[str, str]) -> None:
        """Sample notes of held-out examples, as text in TensorBoard and as a file. `prompts` came before."""
        if self.on and notes:
            with self.carry_on():
                (self.folder / "samples" / f"step-{step:06d}.md").write_text(as_markdown(notes))
                for key, note in notes.items():
                    self.board.note(step, key, note)

    def prompts(self, prompts: dict[str, str]) -> None:
        """What the sample notes are written from."""
        if self.on and prompts:
            with self.carry_on():
                (self.folder / "samples").mkdir(exist_ok=True)
                (self.folder / "samples" / "prompts.md").write_text(as_markdown(prompts))

    def close(self, figures: dict) -> dict:
        """Closes the files and returns what report.json holds now: `figures` and those of the steps, the steps before a resume included."""
        if not self.on:
            return {}
        with self.carry_on():
            self.bar.close()
            self.board.close(self.num_steps)
            self.log.close()
        losses = [
            line["train/loss"]
            for line in map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
            if "train/loss" in line
        ]
        if losses:
            figures = {"train/loss_first": losses[0], "train/loss_last": losses[-1]} | figures
        if self.seconds:
            figures = {
                "train/tokens_per_second": self.tokens / self.seconds,
                "seconds": time.perf_counter() - self.started,
            } | figures
        return write_report(
            self.folder, {"steps": len(losses), "planned_steps": self.num_steps} | figures
        )
