"""The TensorBoard of a run: charts of its scalars, its configuration, its plan, its packed rows.

`./launch.sh board` shows the charts under Custom Scalars and runs side by side under HParams. No
tag, title or picture holds a word of a dialogue or note. The only text of examples is under Text:
the sample notes that monitor.sample_notes names.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import custom_scalars, hparams

from ..config.schema import LORA, Config
from ..data.batch_plan import BatchPlan
from ..data.tokenization import IGNORE, Example
from ..optim.schedule import learning_rates
from .late_file import EventLog
from .step_timer import PHASES
from .summary import markdown_block, write_plan

MEMORY_PARTS = (
    "frozen_weights",
    "scales",
    "trained_weights",
    "masters",
    "moments",
    "gradients",
    "activations_and_rest",
)
CHARTS = {  # category -> title -> tags; a chart shows those that the run has
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
        "seconds of a step on rank 0 "
        "(ZeRO-3's own traffic lies inside forward, backward, optimizer)": [
            *(f"time/{phase}" for phase in PHASES),
            "time/agreement",  # the name of time/sync in runs of earlier versions
        ],
        "seconds of a checkpoint": ["train/save_seconds"],
    },
    "memory of rank 0": {
        "GiB, highest": ["train/gpu_memory_gib"],
        "GiB by component": [f"memory/{part}_gib" for part in MEMORY_PARTS],
    },
}

RGB = tuple[int, int, int]
COLORS: tuple[RGB, ...] = (  # of documents, in turn
    (31, 119, 180),
    (214, 100, 20),
    (44, 140, 44),
    (200, 39, 40),
    (128, 90, 175),
    (130, 86, 75),
)
UNUSED: RGB = (225, 225, 225)
INK: RGB = (40, 40, 40)
TITLE_HEIGHT, BAND_HEIGHT, GAP = 30, 48, 6  # of a packed row in the picture, in pixels


def chart_layout(tags: set[str]) -> dict[str, dict[str, list]]:
    """The charts for a run that has these tags, as `custom_scalars` takes them.

    A chart without tags and a category without charts are left out.
    """
    layout: dict[str, dict[str, list]] = {}
    for category, group in CHARTS.items():
        for title, wanted in group.items():
            # TensorBoard reads a tag as the beginning of a regular expression.
            patterns = [f"^{tag}$" for tag in wanted if tag in tags]
            if patterns:
                layout.setdefault(category, {})[title] = ["Multiline", patterns]
    return layout


def flatten_hparams(config: Config) -> dict[str, float | str]:
    """The recipe as a flat dictionary.

    A field is a number in all runs or a text in all runs, else TensorBoard could not put them into
    one column.
    """
    flat: dict[str, float | str] = {}
    for name, field in Config.model_fields.items():
        value = getattr(config, name)
        if name == "lora":
            for key, setting in value.items():
                is_number = isinstance(setting, (int, float)) and key in LORA
                flat[f"lora.{key}"] = setting if is_number else str(setting)
        elif name == "data":
            for key, setting in value.model_dump(mode="json").items():
                flat[f"data.{key}"] = str(setting)
        elif name not in ("run", "monitor", "deepspeed"):
            flat[name] = value if field.annotation in (int, float) else str(value)
    return flat


def draw_packed_rows(
    rows: list[tuple[str, list[Example]]], capacity: int, width: int = 800
) -> np.ndarray:
    """A picture of packed rows as uint8 [height, width, 3].

    Each document has a colour, pale for its prompt and strong for what is supervised, and a line
    where it begins. What no token fills is grey. rows: (title, documents); capacity: tokens a row.
    """
    font = ImageFont.load_default(20)
    row_height = TITLE_HEIGHT + BAND_HEIGHT + GAP
    image = Image.new("RGB", (width, TITLE_HEIGHT + len(rows) * row_height), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    legend = "a colour a document; pale: its prompt, strong: its note (supervised); grey: unused"
    draw.text((2, 3), legend, INK, font)
    for number, (name, documents) in enumerate(rows):
        top = TITLE_HEIGHT + number * row_height
        tokens = sum(map(len, documents))
        title = f"{name}: {len(documents)} document(s), {tokens:,} of {capacity:,} tokens"
        draw.text((2, top + 3), title, INK, font)
        _draw_band(draw, documents, top + TITLE_HEIGHT, capacity, width)
    return np.asarray(image)


def _draw_band(
    draw: ImageDraw.ImageDraw, documents: list[Example], top: int, capacity: int, width: int
) -> None:
    """Draws one packed row as a band of `width` pixels, `top` pixels below the picture's edge."""
    bottom = top + BAND_HEIGHT - 1
    draw.rectangle((0, top, width - 1, bottom), UNUSED)
    offset = 0  # of the document, in tokens
    for i, document in enumerate(documents):
        strong = COLORS[i % len(COLORS)]
        pale = tuple(255 - (255 - channel) * 35 // 100 for channel in strong)
        for start, end, supervised in _label_spans(document):
            left = (offset + start) * width // capacity
            right = (offset + end) * width // capacity
            if right > left:
                draw.rectangle((left, top, right - 1, bottom), strong if supervised else pale)
        left = offset * width // capacity
        draw.line((left, top, left, bottom), (0, 0, 0))
        offset += len(document)


def _label_spans(document: Example) -> list[tuple[int, int, bool]]:
    """(start, end, supervised) of the spans into which prompts and notes divide the tokens."""
    supervised = document.labels != IGNORE
    changes = np.flatnonzero(supervised[1:] != supervised[:-1]) + 1
    bounds = [0, *changes, len(document)]
    return [(start, end, supervised[start]) for start, end in zip(bounds, bounds[1:])]


class TensorBoardLog:
    """The TensorBoard files of one run, written on rank 0."""

    def __init__(
        self, folder: Path, config: Config, first_step: int, purge: int, tags: set[str]
    ) -> None:
        """Opens a new file in `folder`. Raises OSError.

        Args:
            first_step: where a resumed run starts, else 0.
            purge: TensorBoard drops what earlier files hold from this step on.
            tags: of the scalars that earlier files hold.
        """
        self.config = config
        self.first_step = first_step
        self.board = EventLog(folder, purge)
        self.tags = set(tags)
        self.layout: dict | None = None  # the one that was written last
        # hparams also returns a list of columns. We leave it out: without one, TensorBoard makes a
        # list of all runs, with the columns first that differ.
        _, start, self.end = hparams(flatten_hparams(config), {})
        self._add(start, first_step)

    def _add(self, summary: Summary, step: int) -> None:
        # torch declares file_writer as None
        self.board.file_writer.add_summary(summary, step)  # type: ignore[attr-defined]

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes scalars by tag, and the layout anew where a chart gets another curve."""
        for name in values.keys() - {"step"}:
            self.board.add_scalar(name, values[name], step)
        self.tags |= values.keys()
        layout = chart_layout(self.tags)
        if layout != self.layout:  # TensorBoard takes the last layout
            self.layout = layout
            self._add(custom_scalars(layout), step)

    def plan(
        self,
        plan: BatchPlan,
        text: str,
        examples: list[Example],
        first_split: list[list[list[int]]],
        capacity: int,
    ) -> None:
        """Writes the plan of the run: text, learning rate, histograms, the first step's rows.

        A resumed run writes the curves alone, from its first step on.

        Args:
            text: what `describe_plan` returned.
            first_split: the first step's example ids as `split_step` returns them.
            capacity: tokens of a packed row.
        """
        lengths = np.array([len(example) for example in examples])
        targets = np.array([example.num_targets for example in examples])
        lr = learning_rates(self.config, len(plan))
        write_plan(self.board, text, lengths, lr, self.first_step)
        self.tags |= {"plan/lr", "plan/max_grad_norm"}
        for step in {1, len(plan)}:  # a line needs two points
            if step > self.first_step:
                self.board.add_scalar("plan/max_grad_norm", self.config.max_grad_norm, step)
        if self.first_step:
            return
        self._add_histograms(plan, lengths, targets)
        rows = []
        for rank, micro_batches in enumerate(first_split):
            for i, ids in enumerate(micro_batches):
                rows.append((f"rank {rank}, micro-batch {i + 1}", [examples[e] for e in ids]))
        picture = draw_packed_rows(rows[:16], capacity)
        tag = "plan/packed_rows_of_the_first_step"
        self.board.add_image(tag, picture, 0, dataformats="HWC")

    def _add_histograms(self, plan: BatchPlan, lengths: np.ndarray, targets: np.ndarray) -> None:
        starts = plan.offsets[:-1]
        histograms = {
            "supervised_tokens_of_an_example": targets,
            "tokens_of_a_step": np.add.reduceat(lengths[plan.order], starts),
            "supervised_tokens_of_a_step": np.add.reduceat(targets[plan.order], starts),
            "examples_of_a_step": np.diff(plan.offsets),
        }
        for name, values in histograms.items():
            self.board.add_histogram(f"plan/{name}", values, 0)

    def note(self, step: int, key: str, note: str) -> None:
        """Writes a sample note as text, under the id of its conversation."""
        self.board.add_text(f"notes/{key}", markdown_block(note), step)

    def flush(self) -> None:
        """Writes what was logged. Raises OSError where that fails, and it waits in memory."""
        self.board.flush()

    @property
    def lost(self) -> int:
        """Records that were more than memory may hold while nothing could be written."""
        return self.board.events.file.lost

    def close(self, step: int) -> None:
        """Marks the run as ended and closes the file. Raises OSError."""
        self._add(self.end, step)
        self.board.close()
