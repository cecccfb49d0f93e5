"""Finds dialogues that are in training and in held-out data, word for word or nearly.

Metrics on such examples would measure memory. Texts are compared by MinHash (Broder 1997): each
keeps the 128 smallest hashes of all its runs of 32 characters, without case, punctuation and
spaces. The fraction of the smallest hashes that two texts have in common estimates the fraction of
runs that they have in common.
"""

import functools
from typing import NamedTuple

import numpy as np

from ..distributed.progress import Progress
from .parallel import in_chunks, map_chunks

RUN_LENGTH = 32  # characters; the hash below is made for this number
NUM_HASHES = 128
MIN_SIMILARITY = 0.8  # from here on two dialogues are nearly the same
_PUNCTUATION = bytes(c for c in range(128) if not chr(c).isalnum())


def minhash(text: str) -> np.ndarray:
    """The smallest hashes of a text, uint64 [at most 128], ascending.

    A text of fewer than 32 characters is one run.
    """
    plain = text.lower().encode().translate(None, _PUNCTUATION)
    if len(plain) < RUN_LENGTH:
        plain = plain.ljust(RUN_LENGTH)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is intended
        # The polynomial hash of runs of 2 bytes, of 4, ... of 32, each from two of half the length.
        hashes = np.frombuffer(plain, np.uint8).astype(np.uint64)
        power = np.uint64(0x9E3779B97F4A7C15)
        for half in (1, 2, 4, 8, 16):
            hashes = hashes[:-half] * power + hashes[half:]
            power = power * power
        # Mix the bits, so that the smallest hashes are a fair sample.
        hashes ^= hashes >> np.uint64(29)
        hashes *= np.uint64(0xBF58476D1CE4E5B9)
        hashes ^= hashes >> np.uint64(32)
    if len(hashes) > 8 * NUM_HASHES:  # a partition is faster than sorting them all
        hashes = np.partition(hashes, 2 * NUM_HASHES)[: 2 * NUM_HASHES]
    return np.unique(hashes)[:NUM_HASHES]


def find_near_duplicates(train: list[str], held_out: list[str]) -> list[tuple[int, int, str]]:
    """(index in train, index in held_out, how alike) for each text of train that is in held_out.

    The index in held_out is that of the most similar text there.
    """
    if not train or not held_out:
        return []
    chunks = in_chunks(train)
    find = functools.partial(_find_in, HeldOut.of(held_out))
    found = []
    start = 0
    with Progress("looking for held-out dialogues", len(train), "dialogues") as progress:
        for chunk, leaks in zip(chunks, map_chunks(find, chunks)):
            found += [(start + i, j, how) for i, j, how in leaks]
            start += len(chunk)
            progress.advance(len(chunk))
    return found


class HeldOut(NamedTuple):
    """An inverted index: all hashes of the held-out texts, sorted, and the text that each is of."""

    sketches: list[np.ndarray]  # of each text
    hashes: np.ndarray  # uint64 [n]
    owners: np.ndarray  # int64 [n]

    @staticmethod
    def of(texts: list[str]) -> "HeldOut":
        sketches = [minhash(text) for text in texts]
        hashes = np.concatenate(sketches)
        owners = np.repeat(np.arange(len(texts)), [len(sketch) for sketch in sketches])
        order = np.argsort(hashes, kind="stable")
        return HeldOut(sketches, hashes[order], owners[order])


def _find_in(held_out: HeldOut, texts: list[str]) -> list[tuple[int, int, str]]:
    """As `find_near_duplicates`."""
    sketches, hashes, owners = held_out
    found = []
    for i, text in enumerate(texts):
        sketch = minhash(text)
        starts = np.searchsorted(hashes, sketch)
        num_known = (hashes[np.minimum(starts, len(hashes) - 1)] == sketch).sum()
        if num_known < MIN_SIMILARITY * len(sketch) / 2:
            continue  # nearly all texts end here
        ends = np.searchsorted(hashes, sketch, "right")
        matches = np.concatenate([owners[start:end] for start, end in zip(starts, ends)])
        j = int(np.bincount(matches, minlength=len(sketches)).argmax())
        similarity = _similarity(sketch, sketches[j])
        if similarity == 1:
            found.append((i, j, "the same dialogue"))
        elif similarity >= MIN_SIMILARITY:
            found.append((i, j, f"nearly the same dialogue ({similarity:.0%})"))
    return found


def _similarity(a: np.ndarray, b: np.ndarray) -> float:
    """The estimated fraction of runs that two texts with these smallest hashes have in common."""
    smallest = np.union1d(a, b)[:NUM_HASHES]
    return float(np.isin(smallest, np.intersect1d(a, b)).mean())
