"""The curves of two runs over each other, as a PNG. Drawn with Pillow, which TensorBoard brings: no plotting package for one picture."""

import math
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SCALE = 2  # drawn twice as large and reduced, which smooths the lines
WIDTH, PANEL, LEFT, GAP = (
    1560,
    300,
    84,
    84,
)  # of the picture, a panel's height, room for the numbers beside it, between panels
INK, FAINT, GRID, RIGHT, WRONG = "#222222", "#666666", "#e4e4e4", "#7db4e6", "#c8321e"


def ticks(low: float, high: float) -> list[float]:
    """Some five round numbers from low to high."""
    raw = (high - low) / 7
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    return [
        i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two logarithms; over less than three of them 2 and 5 times those, too."""
    factors = (1, 2, 5) if high - low < 3 else (1,)
    powers = [m * 10.0**k for k in range(math.floor(low), math.ceil(high) + 1) for m in factors]
    return [mark for mark in powers if low <= math.log10(mark) <= high]


class Picture:
    """A white picture whose lengths are those of the finished one."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), "white")
        self.pen = ImageDraw.Draw(self.image)

    def text(self, x, y, text, size=17, fill=INK, anchor="la") -> None:
        self.pen.text(
            (x * SCALE, y * SCALE), text, fill, ImageFont.load_default(size * SCALE), anchor
        )

    def line(self, points, fill, width) -> None:
        self.pen.line(
            [(x * SCALE, y * SCALE) for x, y in points], fill, int(width * SCALE), joint="curve"
        )

    def panel(self, x: float, y: float, width: float, tag: str, right: list, wrong: list) -> None:
        """One tag's curves, lists of (step, value). The right one is broad and below, so that it is seen where the other covers it."""
        values = [v for _, v in right + wrong if math.isfinite(v)]
        log = (
            min(values) > 0 and max(values) > 10 * min(values) and tag != "train/lr"
        )  # else the end of a loss's curve is a flat line
        height_of = math.log10 if log else float
        low, high = height_of(min(values)), height_of(max(values))
        margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
        low, high, last = low - margin, high + margin, max(s for s, _ in right + wrong)
        first = min(s for s, _ in right + wrong)

        def place(step, value):
            value = height_of(value) if math.isfinite(value) else high
            return x + width * (step - first) / max(1, last - first), y + PANEL * (high - value) / (
                high - low
            )

        marks = log_ticks(low, high) if log else ticks(low, high)
        for mark in marks:
            _, at = place(first, mark)
            self.line([(x, at), (x + width, at)], GRID, 1)
            self.text(x - 9, at, f"{mark:.4g}", 15, FAINT, "rm")
        for step in ticks(first, last) if last > first else [first]:
            if step == int(step):
                self.text(place(step, values[0])[0], y + PANEL + 8, f"{int(step)}", 15, FAINT, "ma")
        self.line([(x, y), (x, y + PANEL), (x + width, y + PANEL)], INK, 1)
        self.text(x, y - 27, f"{tag}{' (logarithmic)' if log else ''}", 18)
        self.text(x + width, y + PANEL + 28, "step", 15, FAINT, "ra")
        for curve, fill, wide in ((right, RIGHT, 6), (wrong, WRONG, 2)):
            self.line([place(*point) for point in curve], fill, wide)
            if len(curve) < 12:  # an evaluation every few steps: show where
                for px, py in (place(*point) for point in curve):
                    r = wide * 1.2
                    self.pen.ellipse(
                        [(px - r) * SCALE, (py - r) * SCALE, (px + r) * SCALE, (py + r) * SCALE],
                        fill,
                    )


def draw(
    path: Path, title: str, subtitle: str, paragraph: str, curves: dict[str, tuple[list, list]]
) -> None:
    """curves: for each tag the right and the wrong run's, lists of (step, value)."""
    lines = textwrap.wrap(paragraph, 182)
    width = (WIDTH - LEFT - 30 - GAP * (len(curves) - 1)) / len(curves)
    picture = Picture(WIDTH, 144 + PANEL + 62 + 25 * len(lines) + 20)
    picture.text(30, 20, title, 28)
    picture.text(30, 60, subtitle, 17, FAINT)
    for x, name, fill, wide in ((WIDTH - 250, "right", RIGHT, 6), (WIDTH - 130, "wrong", WRONG, 2)):
        picture.line([(x, 38), (x + 36, 38)], fill, wide)
        picture.text(x + 46, 38, name, 18, INK, "lm")
    for i, (tag, (right, wrong)) in enumerate(curves.items()):
        picture.panel(LEFT + i * (width + GAP), 144, width, tag, right, wrong)
    for i, line in enumerate(lines):
        picture.text(30, 144 + PANEL + 62 + 25 * i, line)
    picture.image.resize(
        (picture.image.width // SCALE, picture.image.height // SCALE), Image.LANCZOS
    ).save(path)
