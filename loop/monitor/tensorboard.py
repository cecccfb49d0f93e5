"""A run's TensorBoard: scalars put together into charts, the configuration beside the figures, the plan, a picture of packed rows.

`./launch.sh board` shows it: the charts under Custom Scalars, runs side by side under HParams. No tag, title or picture holds a word of a
dialogue or note; the sample notes that monitor.sample_notes names are the only text of examples, under Text.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams

from ..config.schema import LORA, Config
from ..data.batch_plan import BatchPlan
from ..data.tokenization import IGNORE, Example
from ..optim.schedule import learning_rates
from .step_timer import PHASES
from .summary import write_plan

CHARTS = {  # category -> title -> tags, of which a chart shows those that the run has
    "training": {
        "loss, nats a supervised token": ["train/loss", "eval/loss"],
        "gradient norm before clipping, and max_grad_norm": [
            "train/grad_norm",
            "plan/max_grad_norm",
        ],
        "steps clipped and skipped so far": ["train/clipped_steps", "train/skipped_steps"],
        "learning rate, planned and actual": ["plan/lr", "train/lr"],
    },
    "speed": {
        "tokens/s": ["train/tokens_per_second"],
        "share of the measured matrix rate (MFU)": ["train/mfu"],
        "seconds of a step on rank 0 (ZeRO-3's own traffic lies inside forward, backward, optimizer)": [
            f"time/{part}" for part in PHASES
        ],
        "seconds of a checkpoint": ["train/save_seconds"],
    },
    "memory of rank 0": {
        "GiB, highest": ["train/gpu_memory_gib"],
        "GiB by component": [
            f"memory/{part}_gib"
            for part in (
                "frozen_weights",
                "scales",
                "trained_weights",
                "masters",
                "moments",
                "gradients",
                "activations_and_rest",
            )
        ],
    },
}
COLORS = (
    (31, 119, 180),
    (214, 100, 20),
    (44, 140, 44),
    (200, 39, 40),
    (128, 90, 175),
    (130, 86, 75),
)  # of documents, in turn
UNUSED, INK = (225, 225, 225), (40, 40, 40)


def layout(tags: set[str]) -> dict[str, dict[str, list]]:
    """The charts for a run that has these tags, as `custom_scalars` takes them. TensorBoard reads a tag as the beginning of a regular expression."""
    charts = {
        category: {
            title: ["Multiline", [f"^{tag}$" for tag in wanted if tag in tags]]
            for title, wanted in group.items()
        }
        for category, group in CHARTS.items()
    }
    shown = {
        category: {title: chart for title, chart in group.items() if chart[1]}
        for category, group in charts.items()
    }
    return {category: group for category, group in shown.items() if group}


def hparams_of(config: Config) -> dict[str, float | str]:
    """The recipe, flat. A field is a number in all runs or a text in all runs, else TensorBoard could not put them into one column."""
    found: dict[str, float | str] = {}
    for name, field in Config.model_fields.items():
        value = getattr(config, name)
        if name == "lora":
            found |= {
                f"lora.{k}": v if isinstance(v, (int, float)) and k in LORA else str(v)
                for k, v in value.items()
            }
        elif name == "data":
            found |= {f"data.{k}": str(v) for k, v in value.model_dump(mode="json").items()}
        elif name not in ("run", "monitor", "deepspeed"):
            found[name] = value if field.annotation in (int, float) else str(value)
    return found


def row_picture(
    rows: list[tuple[str, list[Example]]], capacity: int, width: int = 800
) -> np.ndarray:
    """Packed rows, each (its name, its documents), as uint8 [height, width, 3]: a colour a document, its prompt pale, what is supervised
    strong; a line where a document begins; grey what no token fills of `capacity`."""
    head, band, font = 30, 48, ImageFont.load_default(20)
    image = Image.new("RGB", (width, head + len(rows) * (head + band + 6)), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    draw.text(
        (2, 3),
        "a colour a document; pale: its prompt, strong: its note (supervised); grey: unused",
        INK,
        font,
    )
    for number, (name, documents) in enumerate(rows):
        top = head + number * (head + band + 6)  # of its title; the row lies below
        tokens = sum(map(len, documents))
        draw.text(
            (2, top + 3),
            f"{name}: {len(documents)} document(s), {tokens:,} of {capacity:,} tokens",
            INK,
            font,
        )
        top, start = top + head, 0
        draw.rectangle((0, top, width - 1, top + band - 1), UNUSED)
        for i, document in enumerate(documents):
            strong = COLORS[i % len(COLORS)]
            pale = tuple(255 - (255 - c) * 35 // 100 for c in strong)
            on = document.labels != IGNORE
            bounds = [
                0,
                *(np.flatnonzero(on[1:] != on[:-1]) + 1),
                len(document),
            ]  # where prompt and note alternate
            for a, b in zip(bounds, bounds[1:]):
                x, end = ((start + at) * width // capacity for at in (a, b))
                if end > x:
                    draw.rectangle((x, top, end - 1, top + band - 1), strong if on[a] else pale)
            draw.line(
                (start * width // capacity, top, start * width // capacity, top + band - 1),
                (0, 0, 0),
            )
            start += len(document)
    return np.asarray(image)


class TensorBoardLog:
    """The TensorBoard files of one run, written on rank 0."""

    def __init__(
        self, folder: Path, config: Config, first_step: int, purge: int | None, tags: set[str]
    ) -> None:
        """purge: TensorBoard drops what earlier files hold from this step on. tags: of the scalars that earlier files hold."""
        self.folder, self.config, self.first_step = folder, config, first_step
        self.board, self.tags = SummaryWriter(str(folder), purge_step=purge), set(tags)
        self.shown: dict | None = None  # the layout
        # Not the first of the three, a list of columns: without it TensorBoard makes one of all runs, in which what differs comes first.
        _, start, self.end = hparams(hparams_of(config), {})
        self._add(start, first_step)

    def _add(self, summary: Summary, step: int) -> None:
        self.board.file_writer.add_summary(summary, step)  # type: ignore[attr-defined]  # torch declares it as None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name in values.keys() - {"step"}:
            self.board.add_scalar(name, values[name], step)
        self.tags |= values.keys()
        if (charts := layout(self.tags)) != self.shown:  # TensorBoard takes the last layout
            self.shown = charts
            self._add(custom_scalars(charts), step)

    def plan(
        self,
        plan: BatchPlan,
        text: str,
        examples: list[Example],
        first: list[list[list[int]]],
        capacity: int,
    ) -> None:
        """The run in advance. After a resume only what was dropped from there on. first: the cut of the first step; capacity: tokens of a row."""
        lengths, targets = (
            np.array([len(e) for e in examples]),
            np.array([e.num_targets for e in examples]),
        )
        write_plan(
            self.board, text, lengths, learning_rates(self.config, len(plan)), self.first_step
        )
        self.tags |= {"plan/lr", "plan/max_grad_norm"}
        for step in {1, len(plan)}:  # a line needs two points
            if step > self.first_step:
                self.board.add_scalar("plan/max_grad_norm", self.config.max_grad_norm, step)
        if self.first_step:
            return
        starts = plan.offsets[:-1]
        for name, values in {
            "supervised_tokens_of_an_example": targets,
            "tokens_of_a_step": np.add.reduceat(lengths[plan.order], starts),
            "supervised_tokens_of_a_step": np.add.reduceat(targets[plan.order], starts),
            "examples_of_a_step": np.diff(plan.offsets),
        }.items():
            self.board.add_histogram(f"plan/{name}", values, 0)
        rows = [
            (f"rank {rank}, micro-batch {i + 1}", [examples[e] for e in part])
            for rank, parts in enumerate(first)
            for i, part in enumerate(parts)
        ]
        self.board.add_image(
            "plan/packed_rows_of_the_first_step",
            row_picture(rows[:16], capacity),
            0,
            dataformats="HWC",
        )

    def note(self, step: int, key: str, note: str) -> None:
        """A sample note. The four blanks make it a block of text that Markdown leaves alone."""
        self.board.add_text(f"notes/{key}", "    " + note.replace("\n", "\n    "), step)

    def flush(self) -> None:
        self.board.flush()  # it holds lines back for two minutes

    def reopen(self) -> None:
        """After an error, from which TensorBoard's writer never recovers: another file."""
        self.board = SummaryWriter(str(self.folder))

    def close(self, step: int) -> None:
        self._add(self.end, step)
        self.board.close()
