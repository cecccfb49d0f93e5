"""The same dialogue in training and held-out data, word for word or nearly: figures on it would measure memory.

Texts are compared by MinHash (Broder 1997): of the hashes of all runs of 32 characters, case, punctuation and spacing aside, each keeps
the 128 smallest. The share that two texts' smallest hashes have in common estimates the share that their runs have in common."""

import numpy as np

RUN, KEPT, NEAR = 32, 128, 0.8
_PUNCTUATION = bytes(c for c in range(128) if not chr(c).isalnum())


def minhash(text: str) -> np.ndarray:
    """The smallest hashes of a text, uint64 [at most 128], ascending. A text of fewer than 32 characters is one run."""
    plain = text.lower().encode().translate(None, _PUNCTUATION)
    if len(plain) < RUN:
        plain = plain.ljust(RUN)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        h, power = np.frombuffer(plain, np.uint8).astype(np.uint64), np.uint64(0x9E3779B97F4A7C15)
        for step in (1, 2, 4, 8, 16):  # polynomial hash of runs of 2, 4, ... 32 bytes
            h = h[:-step] * power + h[step:]
            power = power * power
        h ^= h >> np.uint64(29)  # mix, so that the smallest ones are a fair sample
        h *= np.uint64(0xBF58476D1CE4E5B9)
        h ^= h >> np.uint64(32)
    return np.unique(np.partition(h, KEPT * 2)[: KEPT * 2] if len(h) > KEPT * 8 else h)[:KEPT]


def find_near_duplicates(train: list[str], held_out: list[str]) -> list[tuple[int, int, str]]:
    """(index in train, index in held_out, how) for each text of train that is also in held_out, with the closest one there."""
    if not train or not held_out:
        return []
    sketches = [minhash(text) for text in held_out]
    hashes = np.concatenate(sketches)
    owners = np.repeat(np.arange(len(held_out)), [len(s) for s in sketches])
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], owners[order]
    found = []
    for i, text in enumerate(train):
        mine = minhash(text)
        first = np.searchsorted(hashes, mine)
        if (hashes[np.minimum(first, len(hashes) - 1)] == mine).sum() < NEAR * len(mine) / 2:
            continue  # with nearly all texts it ends here
        last = np.searchsorted(hashes, mine, "right")
        common = np.bincount(
            np.concatenate([owners[a:b] for a, b in zip(first, last)]), minlength=len(held_out)
        )
        j = int(common.argmax())
        joint = np.union1d(mine, sketches[j])[:KEPT]
        share = np.isin(joint, np.intersect1d(mine, sketches[j])).mean()
        if share >= NEAR:
            found.append(
                (
                    i,
                    j,
                    "the same dialogue"
                    if share == 1
                    else f"nearly the same dialogue ({share:.0%})",
                )
            )
    return found
