"""How good notes are: likeness to a reference, form, and facts. Each figure is a ratio of sums over examples, with what it has to beat on the
same examples beside it: the dialogue handed in as the note, and the note of the most similar training dialogue."""

import collections
import functools
import math
import re
from typing import NamedTuple

import numpy as np

from ..data.soap import HEADINGS, NAMES, has_all_sections, parse_note
from .facts import Fact, Statements, distinct, facts

ROUGE = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}
KINDS = {
    "number": "numbers, doses, ages",
    "often": "how often",
    "date": "dates",
    "drug": "drugs",
    "side": "left and right",
}
_MARKDOWN = re.compile(r"\*\*|__|`|^\s*(#{1,6}|[*+]) ", re.MULTILINE)
# name -> (what the table calls it, whether it is a share, shown in per cent)
FIGURES = {key: (title, True) for key, title in ROUGE.items()}
FIGURES |= {
    f"{h}/{key}": (f"  {NAMES[h]}, {title}", True) for h in HEADINGS for key, title in ROUGE.items()
}
FIGURES |= {"sections": ("S, O, A, P, in order", True)} | {
    f"section/{h}": (f"  has {h}", True) for h in HEADINGS
}
FIGURES |= {
    "ended": ("ended by itself (EOS)", True),
    "markdown": ("has markdown", True),
    "repetition": ("repeated 4-grams", True),
}
FIGURES |= {
    "length": ("words, of the reference's", False),
    "facts/supported": ("note's facts in dialogue", True),
}
FIGURES |= {f"facts/supported/{kind}": (f"  {title}", True) for kind, title in KINDS.items()} | {
    "facts/kept": ("dialogue's facts in note", True)
}
FIGURES |= {"loss": ("loss, nats a token", False)}


class Row(NamedTuple):
    """An example and its note. ended: whether the note came to its end-of-sequence token; None where nobody knows."""

    id: str
    dialogue: str
    reference: str
    note: str
    ended: bool | None = None


@functools.lru_cache(maxsize=1)
def _scorer():
    from rouge_score import rouge_scorer  # late: it takes a second, and training needs none of it

    # As ACI-Bench does (Yim et al. 2023, doi 10.1038/s41597-023-02487-3): no stemmer; what it calls ROUGE-L is Lsum, a line a sentence.
    return rouge_scorer.RougeScorer(list(ROUGE), use_stemmer=False)


def score_note(row: Row) -> dict[str, tuple[float, float]]:
    """(numerator, denominator) of every figure for one note. ROUGE (Lin 2004) is the F1, 0 for a section that the note lacks; a section that
    the reference lacks counts nothing."""
    found = {
        key: (score.fmeasure, 1.0)
        for key, score in _scorer().score(row.reference, row.note).items()
    }
    wanted, sections = parse_note(row.reference), parse_note(row.note)
    for h in HEADINGS:
        likeness = _scorer().score(wanted[h], sections.get(h, "")) if wanted.get(h) else {}
        found |= {
            f"{h}/{key}": (likeness[key].fmeasure, 1.0) if likeness else (0.0, 0.0) for key in ROUGE
        }
        found[f"section/{h}"] = (float(bool(sections.get(h))), 1.0)
    words = row.note.split()
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    found["sections"] = (float(has_all_sections(row.note)), 1.0)
    found["markdown"] = (float(bool(_MARKDOWN.search(row.note))), 1.0)
    found["repetition"] = (float(len(grams) - len(set(grams))), float(len(grams)))
    found["length"] = (float(len(words)), float(len(row.reference.split())))
    found["ended"] = (float(bool(row.ended)), float(row.ended is not None))
    said, noted = Statements(row.dialogue), Statements(row.note)
    stated = distinct(noted.facts)
    for kind in KINDS:
        found[f"facts/supported/{kind}"] = (
            float(sum(said.supports(f) for f in stated if f.kind == kind)),
            float(sum(f.kind == kind for f in stated)),
        )
    above, below = zip(*(found[f"facts/supported/{kind}"] for kind in KINDS))
    found["facts/supported"] = (sum(above), sum(below))
    told = distinct(said.facts)
    found["facts/kept"] = (float(sum(map(noted.supports, told))), float(len(told)))
    return found


def unsupported(row: Row) -> list[Fact]:
    """Every mention in the note of a fact that the dialogue does not support."""
    said = Statements(row.dialogue)
    return [fact for fact in facts(row.note) if not said.supports(fact)]


def ratio(pairs: np.ndarray) -> float | None:
    """Sum of numerators over sum of denominators, float [n, 2]; None where nothing counts."""
    above, below = pairs.sum(0)
    return float(above / below) if below else None


def interval(pairs: np.ndarray, draws: int = 1000) -> tuple[float | None, float | None]:
    """95 % bootstrap interval of `ratio` over examples (percentiles; Efron 1979), the same for the same pairs, float [n, 2]."""
    drawn = np.random.default_rng(0).integers(0, len(pairs), (draws, len(pairs)))
    sums = pairs[drawn].sum(1)  # [draws, 2]
    sums = sums[sums[:, 1] > 0]
    low, high = (
        np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5]).tolist() if len(sums) else (None, None)
    )
    return low, high


def summarise(systems: dict[str, list[dict]]) -> dict[str, dict]:
    """{figure: {"value", "low", "high", and the value of every other system}} from the scores of each example. The first system is the one
    that is measured. A figure that counts nothing anywhere is left out."""
    (measured, scores), *others = systems.items()
    report = {}
    for name in FIGURES:
        pairs = np.array([score.get(name, (0, 0)) for score in scores], dtype=np.float64)
        if pairs[:, 1].any():
            low, high = interval(pairs)
            report[name] = {"value": ratio(pairs), "low": low, "high": high}
            report[name] |= {
                other: ratio(np.array([s.get(name, (0, 0)) for s in theirs], dtype=np.float64))
                for other, theirs in others
            }
    return report


def as_table(report: dict[str, dict]) -> str:
    """The figures as text, a line each; shares in per cent."""
    others = list(
        dict.fromkeys(
            key
            for figure in report.values()
            for key in figure
            if key not in ("value", "low", "high")
        )
    )
    lines = [
        f"  {'':28}{'notes':>8}  {'95 % interval':^17}"
        + "".join(f"{other:>14}" for other in others)
    ]
    for name, figure in report.items():
        title, share = FIGURES[name]
        shown = {
            k: ""
            if v is None
            else f"{100 * v:.1f}"
            if share
            else f"{v:.4f}"
            if name == "loss"
            else f"{v:.2f}"
            for k, v in figure.items()
        }
        span = f"{shown['low']} to {shown['high']}" if shown["low"] else ""
        lines.append(
            f"  {title:28}{shown['value']:>8}  {span:^17}"
            + "".join(f"{shown.get(other, ''):>14}" for other in others)
        )
    return "\n".join(line.rstrip() for line in lines)


def most_similar(queries: list[str], corpus: list[str]) -> list[int]:
    """For each query the place in the corpus of the text with the highest TF-IDF cosine (words; (1 + log tf) log(n / df), n texts of the
    corpus). The first of equals."""
    counts = [collections.Counter(re.findall(r"\w+", text.lower())) for text in corpus]
    documents = collections.Counter(word for count in counts for word in count)
    weigh = {word: math.log(len(corpus) / n) for word, n in documents.items()}
    postings: dict[str, tuple[list[int], list[float]]] = collections.defaultdict(lambda: ([], []))
    norms = np.ones(len(corpus))
    for i, count in enumerate(counts):
        weights = {word: (1 + math.log(n)) * weigh[word] for word, n in count.items()}
        norms[i] = math.sqrt(sum(w * w for w in weights.values())) or 1.0
        for word, weight in weights.items():
            postings[word][0].append(i)
            postings[word][1].append(weight)
    arrays = {
        word: (np.array(ids), np.array(weights))
        for word, (ids, weights) in postings.items()
        if weigh[word]
    }
    best = []
    for query in queries:
        likeness = np.zeros(len(corpus))
        for word, n in collections.Counter(re.findall(r"\w+", query.lower())).items():
            if word in arrays:
                ids, theirs = arrays[word]
                likeness[ids] += (1 + math.log(n)) * weigh[word] * theirs
        best.append(int((likeness / norms).argmax()))
    return best
