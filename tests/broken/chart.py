"""The curves of two runs in one picture, as a PNG.

It is drawn with Pillow, which TensorBoard brings: no plotting package for one picture.
"""

import math
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SCALE = 2  # drawn twice as large and reduced, which smooths the lines
WIDTH = 1560  # of the picture
TOP = 144  # of the panels
PANEL = 300  # height of a panel
LEFT = 84  # margin for the numbers beside a panel
GAP = 84  # between panels
INK, FAINT, GRID, RIGHT, WRONG = "#222222", "#666666", "#e4e4e4", "#7db4e6", "#c8321e"

Curve = list[tuple[int, float]]  # (step, value)


def ticks(low: float, high: float) -> list[float]:
    """Some five round numbers from low to high."""
    raw = (high - low) / 7
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two logarithms.

    Over less than three powers 2 and 5 times those, too.
    """
    factors = (1, 2, 5) if high - low < 3 else (1,)
    exponents = range(math.floor(low), math.ceil(high) + 1)
    values = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    return [value for value in values if low <= math.log10(value) <= high]


class Axes:
    """Where (step, value) is in a panel, in pixels."""

    def __init__(self, x: float, y: float, width: float, tag: str, points: Curve) -> None:
        """points: of all curves of the panel."""
        self.x = x
        self.y = y
        self.width = width
        values = [value for _, value in points if math.isfinite(value)]
        # On a linear axis the end of a loss's curve would be a flat line.
        self.is_log = min(values) > 0 and max(values) > 10 * min(values) and tag != "train/lr"
        self.transform = math.log10 if self.is_log else float
        low, high = self.transform(min(values)), self.transform(max(values))
        margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
        self.low, self.high = low - margin, high + margin
        self.first = min(step for step, _ in points)
        self.last = max(step for step, _ in points)

    def x_at(self, step: float) -> float:
        return self.x + self.width * (step - self.first) / max(1, self.last - self.first)

    def y_at(self, value: float) -> float:
        """NaN and inf are at the top."""
        height = self.transform(value) if math.isfinite(value) else self.high
        return self.y + PANEL * (self.high - height) / (self.high - self.low)

    def value_ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.is_log else ticks(self.low, self.high)

    def step_ticks(self) -> list[int]:
        if self.last == self.first:
            return [self.first]
        return [int(step) for step in ticks(self.first, self.last) if step == int(step)]


class Picture:
    """A white picture. All lengths are those of the picture before it is enlarged by SCALE."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), "white")
        self.pen = ImageDraw.Draw(self.image)

    def text(self, x, y, text, size=17, fill=INK, anchor="la") -> None:
        font = ImageFont.load_default(size * SCALE)
        self.pen.text((x * SCALE, y * SCALE), text, fill, font, anchor)

    def line(self, points, fill, width) -> None:
        points = [(x * SCALE, y * SCALE) for x, y in points]
        self.pen.line(points, fill, int(width * SCALE), joint="curve")

    def dot(self, x, y, radius, fill) -> None:
        corners = (x - radius, y - radius, x + radius, y + radius)
        self.pen.ellipse([length * SCALE for length in corners], fill)

    def panel(self, x: float, width: float, tag: str, right: Curve, wrong: Curve) -> None:
        """One tag's curves.

        The right one is broad and below, so that it is seen where the other one covers it.
        """
        axes = Axes(x, TOP, width, tag, right + wrong)
        bottom = TOP + PANEL
        for value in axes.value_ticks():
            y = axes.y_at(value)
            self.line([(x, y), (x + width, y)], GRID, 1)
            self.text(x - 9, y, f"{value:.4g}", 15, FAINT, "rm")
        for step in axes.step_ticks():
            self.text(axes.x_at(step), bottom + 8, f"{step}", 15, FAINT, "ma")
        self.line([(x, TOP), (x, bottom), (x + width, bottom)], INK, 1)
        self.text(x, TOP - 27, f"{tag}{' (logarithmic)' if axes.is_log else ''}", 18)
        self.text(x + width, bottom + 28, "step", 15, FAINT, "ra")
        for curve, fill, line_width in ((right, RIGHT, 6), (wrong, WRONG, 2)):
            points = [(axes.x_at(step), axes.y_at(value)) for step, value in curve]
            self.line(points, fill, line_width)
            if len(curve) < 12:  # an evaluation every few steps: show where
                for point in points:
                    self.dot(*point, line_width * 1.2, fill)

    def save(self, path: Path) -> None:
        size = (self.image.width // SCALE, self.image.height // SCALE)
        self.image.resize(size, Image.LANCZOS).save(path)


def draw(
    path: Path, title: str, subtitle: str, paragraph: str, curves: dict[str, tuple[Curve, Curve]]
) -> None:
    """Writes the picture. curves: for each tag the right and the wrong run's."""
    lines = textwrap.wrap(paragraph, 182)
    text_top = TOP + PANEL + 62
    width = (WIDTH - LEFT - 30 - GAP * (len(curves) - 1)) / len(curves)
    picture = Picture(WIDTH, text_top + 25 * len(lines) + 20)
    picture.text(30, 20, title, 28)
    picture.text(30, 60, subtitle, 17, FAINT)
    for x, name, fill, line_width in (
        (WIDTH - 250, "right", RIGHT, 6),
        (WIDTH - 130, "wrong", WRONG, 2),
    ):
        picture.line([(x, 38), (x + 36, 38)], fill, line_width)
        picture.text(x + 46, 38, name, 18, INK, "lm")
    for i, (tag, (right, wrong)) in enumerate(curves.items()):
        picture.panel(LEFT + i * (width + GAP), width, tag, right, wrong)
    for i, line in enumerate(lines):
        picture.text(30, text_top + 25 * i, line)
    picture.save(path)
