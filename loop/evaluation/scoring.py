"""Scores notes: likeness to a reference, form, and facts.

Each metric is a ratio of sums over examples. `METRICS` lists them all: a new metric is one function
of a `ParsedNote` and one entry there, and then stands in the report and in the table.
"""

import bisect
import functools
import math
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from ..config.schema import TaskConfig
from ..data.soap import SOAP, has_all_sections, parse_note, section_starts
from ..facts.judges.verdicts import CONTRADICTED, KINDS, NOT_SAID, SUPPORTED, Verdict, distinct
from ..facts.matching import Comparison, compare
from .rouge import ROUGE, edit_similarity, rouge_scores

TITLE_WIDTH = 28  # of the table's first column, at least
# Of white space without line breaks: many empty lines would be read again from each of them.
_MARKDOWN = re.compile(r"\*\*|__|`|^[^\S\n]*(#{1,6}|[*+]) ", re.MULTILINE)

Z = 1.959964  # the 97.5 % quantile of the normal distribution
STUDENT_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060)  # of 1 to 8
FEW_NOTES = 10

Score = tuple[float, float]  # a metric's numerator and denominator for one note


class Row(NamedTuple):
    """An example and its note."""

    id: str
    dialogue: str
    reference: str
    note: str
    ended: bool | None = None  # whether the note reached its end-of-sequence token; None: unknown
    looped: bool = False  # whether it was cut off because it ran in circles


class ParsedNote:
    """A row, and what several metrics read of it, computed at most once."""

    def __init__(self, row: Row, task: TaskConfig = SOAP) -> None:
        self.row = row
        self.task = task
        self.words = row.note.split()

    @functools.cached_property
    def sections(self) -> dict[str, str]:
        return parse_note(self.row.note, self.task)

    @functools.cached_property
    def rouge(self) -> dict[str, float]:
        """The F1 of the note by name of the metric."""
        return rouge_scores(self.row.reference, self.row.note)

    @functools.cached_property
    def section_rouge(self) -> dict[str, dict[str, float]]:
        """The F1 of each section that the reference has, by heading."""
        reference = parse_note(self.row.reference, self.task)
        return {
            heading: rouge_scores(reference[heading], self.sections.get(heading, ""))
            for heading in self.task.headings
            if reference.get(heading)
        }

    @functools.cached_property
    def comparison(self) -> Comparison:
        return compare(self.row.dialogue, self.row.note)

    @functools.cached_property
    def facts(self) -> list[Verdict]:
        """What the dialogue says of the note's distinct facts, claims left out."""
        return [v for v in distinct(self.comparison.note) if v.statement.kind != "claim"]

    @functools.cached_property
    def reference_facts(self) -> list[Verdict]:
        """What the note says of the reference's distinct facts, claims left out."""
        found = distinct(compare(self.row.note, self.row.reference).note)
        return [v for v in found if v.statement.kind != "claim"]


def rouge(note: ParsedNote, name: str) -> Score:
    """The F1 of a ROUGE (Lin 2004)."""
    return note.rouge[name], 1.0


def section_rouge(note: ParsedNote, heading: str, name: str) -> Score:
    """The F1 of one section: 0 if the note lacks it; not counted if the reference lacks it."""
    scores = note.section_rouge.get(heading)
    return (scores[name], 1.0) if scores else (0.0, 0.0)


def edits(note: ParsedNote) -> Score:
    return edit_similarity(note.row.reference, note.row.note), 1.0


def has_sections_in_order(note: ParsedNote) -> Score:
    return float(has_all_sections(note.row.note, note.task)), 1.0


def has_section(note: ParsedNote, heading: str) -> Score:
    return float(bool(note.sections.get(heading))), 1.0


def ended(note: ParsedNote) -> Score:
    """Not counted where nobody knows, as for notes from a file."""
    return float(bool(note.row.ended)), float(note.row.ended is not None)


def looped(note: ParsedNote) -> Score:
    """Not counted where nobody knows, as for notes from a file."""
    return float(note.row.looped), float(note.row.ended is not None)


def markdown(note: ParsedNote) -> Score:
    return float(bool(_MARKDOWN.search(note.row.note))), 1.0


def repetition(note: ParsedNote) -> Score:
    """The fraction of 4-grams that occurred in the note before."""
    words = note.words
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return float(len(grams) - len(set(grams))), float(len(grams))


def length(note: ParsedNote) -> Score:
    return float(len(note.words)), float(len(note.row.reference.split()))


def facts_that_are(
    note: ParsedNote, verdict: str, kind: str | None = None, heading: str | None = None
) -> Score:
    """The fraction of the note's distinct facts, of one kind or section or all, with a verdict."""
    stated = note.facts
    if heading is not None:
        stated = in_section(note.row.note, stated, heading, note.task)
    stated = [v for v in stated if kind in (None, v.statement.kind)]
    return float(sum(v.verdict == verdict for v in stated)), float(len(stated))


def critical(note: ParsedNote) -> Score:
    """The fraction of the note's facts that are wrong or unsaid and may harm a patient."""
    return float(sum(v.is_critical for v in note.facts)), float(len(note.facts))


def agreeing_claims(note: ParsedNote) -> Score:
    """The fraction of what is said in other words that the dialogue does not refute."""
    claims = [v for v in distinct(note.comparison.note) if v.statement.kind == "claim"]
    return float(sum(v.verdict == SUPPORTED for v in claims)), float(len(claims))


def kept_facts(note: ParsedNote) -> Score:
    """The fraction of the dialogue's distinct facts that the note supports."""
    stated = distinct(note.comparison.dialogue)
    return float(sum(v.verdict == SUPPORTED for v in stated)), float(len(stated))


def kept_of_section(note: ParsedNote, heading: str) -> Score:
    """The fraction of the distinct facts of the reference's section that the note supports."""
    stated = in_section(note.row.reference, note.reference_facts, heading, note.task)
    return float(sum(v.verdict == SUPPORTED for v in stated)), float(len(stated))


def in_section(
    text: str, found: list[Verdict], heading: str, task: TaskConfig = SOAP
) -> list[Verdict]:
    """The verdicts on what stands in a section of a note."""
    starts = section_starts(text, task)
    return [v for v in found if section_of(starts, v.statement.start) == heading]


def section_of(starts: list[tuple[int, str]], place: int) -> str:
    """The heading of the section where a place of a note lies; "" before the first one.

    starts: of `section_starts`.
    """
    at = bisect.bisect(starts, place, key=lambda start: start[0])
    return starts[at - 1][1] if at else ""


def as_percent(value: float) -> str:
    return f"{100 * value:.1f}"


class Metric(NamedTuple):
    title: str  # in the table
    score: Callable[[ParsedNote], Score] | None  # None: measured elsewhere, not on notes
    format: Callable[[float], str] = as_percent


def _rouge_metrics() -> dict[str, Metric]:
    return {
        name: Metric(title, functools.partial(rouge, name=name)) for name, title in ROUGE.items()
    }


def fact_metrics(headings: Iterable[str] = ()) -> dict[str, Metric]:
    """The metrics of facts, of all of a note and of its sections with these headings."""

    def share(
        verdict: str, kind: str | None = None, heading: str | None = None
    ) -> Callable[[ParsedNote], Score]:
        return functools.partial(facts_that_are, verdict=verdict, kind=kind, heading=heading)

    kinds = {
        f"facts/supported/{kind}": Metric(f"  {title}", share(SUPPORTED, kind=kind))
        for kind, title in KINDS.items()
        if kind != "claim"
    }
    sections = {
        f"facts/supported/{heading}": Metric(f"  in {heading}", share(SUPPORTED, heading=heading))
        for heading in headings
    }
    kept = {
        f"facts/kept/{heading}": Metric(
            f"  reference's {heading} in note", functools.partial(kept_of_section, heading=heading)
        )
        for heading in headings
    }
    return {
        "facts/supported": Metric("note's facts in dialogue", share(SUPPORTED)),
        **kinds,
        **sections,
        "facts/contradicted": Metric("  contradicted by it", share(CONTRADICTED)),
        "facts/unsaid": Metric("  not said in it", share(NOT_SAID)),
        "facts/critical": Metric("  of these, critical", critical),
        "facts/claims": Metric("claims not refuted", agreeing_claims),
        "facts/kept": Metric("dialogue's facts in note", kept_facts),
        **kept,
    }


FORM = {
    "edits": Metric("character edit similarity", edits),
    "ended": Metric("ended by itself (EOS)", ended),
    "looped": Metric("ran in circles, cut off", looped),
    "markdown": Metric("has markdown", markdown),
    "repetition": Metric("repeated 4-grams", repetition),
    "length": Metric("words, of the reference's", length, "{:.2f}".format),
}
# In the order of the report and of the table. Those of sections stand between: `metrics_of`.
METRICS: dict[str, Metric] = {**_rouge_metrics(), **FORM, **fact_metrics()}
METRICS["loss"] = Metric("loss, nats a token", None, "{:.4f}".format)


def section_metrics(task: TaskConfig) -> dict[str, Metric]:
    """The metrics of a task's sections; {} for a task without headings."""
    if not task.headings:
        return {}
    metrics = {}
    for heading, name in task.headings.items():
        shown = name if isinstance(name, str) else heading
        for rouge_name, title in ROUGE.items():
            score = functools.partial(section_rouge, heading=heading, name=rouge_name)
            metrics[f"{heading}/{rouge_name}"] = Metric(f"  {shown}, {title}", score)
    title = f"{', '.join(task.headings)}, in order"
    if len(title) > TITLE_WIDTH:
        title = "all headings, in order"
    metrics["sections"] = Metric(title, has_sections_in_order)
    for heading in task.headings:
        score = functools.partial(has_section, heading=heading)
        metrics[f"section/{heading}"] = Metric(f"  has {heading}", score)
    return metrics


def metrics_of(task: TaskConfig) -> dict[str, Metric]:
    """All metrics of a task's notes, in the order of the report and of the table."""
    first = {name: METRICS[name] for name in ROUGE}
    return {**first, **section_metrics(task), **FORM, **fact_metrics(task.headings), **METRICS}


def score_note(row: Row, task: TaskConfig = SOAP) -> dict[str, Score]:
    """(numerator, denominator) of every metric for one note."""
    note = ParsedNote(row, task)
    return {name: metric.score(note) for name, metric in metrics_of(task).items() if metric.score}


def flagged(row: Row) -> list[Verdict]:
    """Every statement of the note that the dialogue contradicts or does not say, in its order."""
    found = [v for v in compare(row.dialogue, row.note).note if v.verdict != SUPPORTED]
    return sorted(found, key=lambda v: v.statement.start)


def ratio(pairs: np.ndarray) -> float | None:
    """Sum of numerators over sum of denominators; None where the denominators are all zero.

    pairs: float [n, 2].
    """
    numerator, denominator = pairs.sum(0)
    return float(numerator / denominator) if denominator else None


def interval(pairs: np.ndarray, share: bool = False) -> tuple[float | None, float | None]:
    """(low, high) of the 95 % interval of `ratio` over examples, made to hold for few of them.

    The standard error is that of a ratio of sums, with Student's t for the examples. A share gets
    Wilson's interval (1927) for as many trials as would have that error (Korn and Graubard 1998),
    or as there are examples where they don't differ: 4 of 4 is 51 to 100 %. Both are None where the
    denominators are all zero, and without a second example, except for a share.

    Args:
        pairs: float [n, 2].
        share: whether the ratio lies between 0 and 1 by what it is.
    """
    value = ratio(pairs)
    if value is None:
        return None, None
    pairs = pairs[pairs[:, 1] > 0]
    n = len(pairs)
    rest = pairs[:, 0] - value * pairs[:, 1]
    error = math.sqrt(n / max(n - 1, 1) * (rest**2).sum()) / float(pairs[:, 1].sum())
    if share and 0 <= value <= 1:
        trials = float(n)
        if n > 1 and error and not np.isin(pairs, (0, 1)).all():
            trials = value * (1 - value) / error**2 * (Z / student_t(n - 1)) ** 2
        return wilson_interval(value, trials)
    if n == 1:
        return None, None
    margin = student_t(n - 1) * error
    return value - margin, value + margin


def wilson_interval(share: float, trials: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share that was seen in so many trials."""
    weight = Z * Z / trials
    center = (share + weight / 2) / (1 + weight)
    margin = math.sqrt(share * (1 - share) * weight + weight * weight / 4) / (1 + weight)
    low = center - margin if share > 0 else 0.0
    return low, center + margin if share < 1 else 1.0


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to 0.1 %. freedom: at least 1."""
    if freedom <= len(STUDENT_T):
        return STUDENT_T[freedom - 1]
    # Abramowitz and Stegun, 26.7.5
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + (Z**3 + Z) / 4 / freedom + second / freedom**2 + third / freedom**3


def summarise(systems: dict[str, list[dict]], task: TaskConfig = SOAP) -> dict[str, dict]:
    """{metric: {"value", "low", "high", "of", and the value of every other system}}

    "of" is the number of notes that the metric counts.

    systems: name -> the scores of each example, as `score_note` returns them. The first system is
    the one that is measured. A metric whose denominators are zero in all examples is left out.
    """
    (_, scores), *others = systems.items()
    report = {}
    for name, metric in metrics_of(task).items():
        pairs = _pairs(scores, name)
        if not pairs[:, 1].any():
            continue
        low, high = interval(pairs, share=metric.format is as_percent)
        counted = int((pairs[:, 1] > 0).sum())
        report[name] = {"value": ratio(pairs), "low": low, "high": high, "of": counted}
        for other, other_scores in others:
            report[name][other] = ratio(_pairs(other_scores, name))
    return report


def _pairs(scores: list[dict], name: str) -> np.ndarray:
    """The (numerator, denominator) of a metric for each example: float64 [n, 2]."""
    return np.array([score.get(name, (0, 0)) for score in scores], dtype=np.float64)


def as_table(report: dict[str, dict], task: TaskConfig = SOAP) -> str:
    """A report of `summarise` as text, a line for each metric."""
    metrics = metrics_of(task)
    columns = dict.fromkeys(key for values in report.values() for key in values)
    others = [key for key in columns if key not in ("value", "low", "high", "of")]
    width = max([TITLE_WIDTH, *(len(metrics[name].title) for name in report)])
    header = f"  {'':{width}}{'notes':>8}  {'95 % interval':^17}"
    lines = [header + "".join(f"{other:>14}" for other in others)]
    for name, values in report.items():
        metric = metrics[name]
        cells = {
            key: "" if value is None else metric.format(value)
            for key, value in values.items()
            if key != "of"
        }
        span = f"{cells['low']} to {cells['high']}" if cells["low"] else ""
        line = f"  {metric.title:{width}}{cells['value']:>8}  {span:^17}"
        lines.append(line + "".join(f"{cells.get(other, ''):>14}" for other in others))
    if any(values.get("of", FEW_NOTES) < FEW_NOTES for values in report.values()):
        lines.append(f"  Figures of fewer than {FEW_NOTES} notes say little: read the intervals.")
    return "\n".join(line.rstrip() for line in lines)
