"""ROUGE of a note (Lin 2004) and its edit distance, for texts of any length and kind.

Words and n-grams are those of `rouge-score`, and every figure equals its own to the bit, but for
texts of one word or none. Its longest common subsequence fills a table of Python integers: a minute
and gigabytes for a note that ran in circles. Here a row of the table is the bits of one integer,
and few rows are kept.
"""

import collections
import functools
import math
from collections.abc import Callable, Iterator

# As in the report -> as in print.
ROUGE = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}
CACHED_MASKS = 1024


@functools.lru_cache(maxsize=1)
def _ngram_scorer():
    from rouge_score import rouge_scorer  # late: it takes a second, and training needs none of it

    # As ACI-Bench does (Yim et al. 2023, doi 10.1038/s41597-023-02487-3): no stemmer. What it calls
    # ROUGE-L is rougeLsum, with a line as a sentence.
    return rouge_scorer.RougeScorer(["rouge1", "rouge2"], use_stemmer=False)


@functools.lru_cache(maxsize=1)
def _tokenizer() -> Callable[[str], list[str]]:
    from rouge_score.tokenizers import DefaultTokenizer  # late, as above

    return DefaultTokenizer(use_stemmer=False).tokenize


def rouge_scores(reference: str, note: str) -> dict[str, float]:
    """{name in ROUGE: the F1 of the note, 0 to 1}; 0 where one of the two has no word.

    In one thing it departs from the library: the same words are alike, also where they are too few
    for a pair ("None."), or none at all ("-").

    The time is linear in the note, for the same reference: rows of bits as long as the note, one
    for each word of the reference.
    """
    tokenize = _tokenizer()
    scores = {name: s.fmeasure for name, s in _ngram_scorer().score(reference, note).items()}
    words = tokenize(reference)
    note_words = tokenize(note)
    if not words and reference.strip() and reference.strip() == note.strip():
        return dict.fromkeys(ROUGE, 1.0)
    if len(words) == 1 and words == note_words:
        scores["rouge2"] = 1.0
    length = lcs_length(words, note_words)
    scores["rougeL"] = _f1(length, len(words), len(note_words))
    lines = [tokenize(line) for line in reference.split("\n")]
    note_lines = [tokenize(line) for line in note.split("\n")]
    scores["rougeLsum"] = _summary_f1(lines, note_lines)
    return scores


def _f1(hits: int, num_reference: int, num_note: int) -> float:
    """Of words that agree, and of the words of both."""
    if not num_reference or not num_note:
        return 0.0
    precision = hits / num_note
    recall = hits / num_reference
    if precision + recall == 0:
        return 0.0
    return 2 * precision * recall / (precision + recall)


def _summary_f1(lines: list[list[str]], note_lines: list[list[str]]) -> float:
    """ROUGE-Lsum: for each line of the reference the union of its LCS with every line of the note.

    A word counts as a hit as often as both texts have it, at most, as in ROUGE 1.5.5.
    """
    left = collections.Counter(word for line in lines for word in line)
    num_reference = left.total()
    note_left = collections.Counter(word for line in note_lines for word in line)
    num_note = note_left.total()
    # A note that runs in circles has few different lines.
    distinct = dict.fromkeys(map(tuple, note_lines))
    holding: dict[str, list[tuple[str, ...]]] = collections.defaultdict(list)
    for note_line in distinct:
        for word in dict.fromkeys(note_line):
            holding[word].append(note_line)
    unions: dict[tuple[str, ...], list[int]] = {}
    hits = 0
    for line in map(tuple, lines):
        if line not in unions:
            unions[line] = _union_lcs(line, holding)
        for i in unions[line]:
            word = line[i]
            if left[word] > 0 and note_left[word] > 0:
                hits += 1
                left[word] -= 1
                note_left[word] -= 1
    return _f1(hits, num_reference, num_note)


def _union_lcs(line: tuple[str, ...], holding: dict[str, list[tuple[str, ...]]]) -> list[int]:
    """Which words of a line belong to its LCS with some line of the note, in their order.

    holding: the different lines of the note that hold a word.
    """
    positions = positions_of(line)
    candidates = dict.fromkeys(
        candidate for word in positions for candidate in holding.get(word, ())
    )
    union: set[int] = set()
    for candidate in candidates:
        if len(union) == len(line):
            break
        # Other words of the line have no part in it.
        rows = sorted(i for word in set(candidate) for i in positions.get(word, ()))
        union |= {rows[i] for i in lcs_indices([line[i] for i in rows], candidate)}
    return sorted(union)


def positions_of(words: tuple[str, ...] | list[str]) -> dict[str, list[int]]:
    """{word: where it stands}"""
    positions: dict[str, list[int]] = collections.defaultdict(list)
    for i, word in enumerate(words):
        positions[word].append(i)
    return dict(positions)


class LcsTable:
    """The table of the longest common subsequences (LCS) of the beginnings of two lists of words.

    Bit j of row i is set where the LCS of the first i words of `words` with the first j + 1 of
    `others` is one longer than that with the first j (Allison and Dix 1986, doi
    10.1016/0020-0190(86)90091-8).
    """

    def __init__(self, words: list[str], others: list[str] | tuple[str, ...]) -> None:
        self.words = words
        self.num_bytes = len(others) // 8 + 1
        self.positions = positions_of(others)
        self.mask = functools.lru_cache(maxsize=CACHED_MASKS)(self._make_mask)

    def _make_mask(self, word: str) -> int:
        """Where `others` has the word."""
        bits = bytearray(self.num_bytes)
        for j in self.positions.get(word, ()):
            bits[j >> 3] |= 1 << (j & 7)
        return int.from_bytes(bits, "little")

    def rows(self, first: int = 0, row: int = 0) -> Iterator[int]:
        """The rows after row number `first`, which is `row`."""
        for word in self.words[first:]:
            # Between two bits of the row, the first occurrence of the word takes the second's part.
            either = row | self.mask(word)
            row = either & ((either - ((row << 1) | 1)) ^ either)
            yield row


def lcs_length(words: list[str], others: list[str]) -> int:
    """The number of words of the longest common subsequence.

    The time is that of the shorter list's length times 1/64 of the longer one's.
    """
    if len(words) > len(others):
        words, others = others, words
    row = 0
    for row in LcsTable(words, others).rows():
        pass
    return row.bit_count()


def lcs_indices(words: list[str], others: tuple[str, ...]) -> list[int]:
    """Which of `words` belong to their longest common subsequence with `others`.

    Of several it takes the one that `rouge-score` takes. Time as of `lcs_length`; of n rows it
    keeps 2 sqrt(n), and computes the others twice.
    """
    table = LcsTable(words, others)
    stride = math.isqrt(len(words)) + 1
    kept = [0] + [row for i, row in enumerate(table.rows(), 1) if i % stride == 0]
    found = []
    j = len(others)
    first = len(words) + 1  # the rows of `block` begin with this one
    block: list[int] = []
    for i in range(len(words), 0, -1):
        if j == 0:
            break
        if i - 1 < first:
            first = (i - 1) // stride * stride
            rows = table.rows(first, kept[first // stride])
            block = [kept[first // stride], *(row for row, _ in zip(rows, range(stride)))]
        row = block[i - first]
        above = block[i - 1 - first]
        j, matched = _walk_left(row, above, words[i - 1], others, j)
        if matched:
            found.append(i - 1)
    return found


def _walk_left(
    row: int, above: int, word: str, others: tuple[str, ...], j: int
) -> tuple[int, bool]:
    """(the column where the way back leaves a row of the table, whether its word is a match).

    Args:
        row: of the table.
        above: the row before it.
        word: of the row.
        others: of the columns.
        j: the column where the way comes into the row.
    """
    columns = (1 << j) - 1
    here_length = (row & columns).bit_count()
    above_length = (above & columns).bit_count()
    while j:
        if others[j - 1] == word:
            return j - 1, True
        # The column to the left is worth more than the row above only where this row has an
        # element more, and not in this very column.
        if here_length == above_length or row >> (j - 1) & 1:
            return j, False
        j -= 1
        above_length -= above >> j & 1
    return j, False


def edit_similarity(reference: str, note: str) -> float:
    """1 minus the character edit distance (Levenshtein 1966) over the longer text's length.

    1 for the same text, 0 where nothing can stay; white space counts as one space.
    """
    reference, note = (" ".join(text.split()) for text in (reference, note))
    longer = max(len(reference), len(note))
    return 1 - edit_distance(reference, note) / longer if longer else 1.0


def edit_distance(text: str, other: str) -> int:
    """How many characters to insert, delete or replace to turn the one text into the other.

    A column of the table is the bits of two integers (Myers 1999, doi 10.1145/316542.316550; Hyyro
    2003): where a character of `other` more costs one more, and where one less. The time is that of
    `lcs_length`, and only one column is kept.
    """
    if not text or not other:
        return len(text) + len(other)
    mask = LcsTable(list(text), tuple(other)).mask
    columns = (1 << len(other)) - 1
    last = 1 << (len(other) - 1)
    more = columns
    less = 0
    distance = len(other)
    for character in text:
        match = mask(character)
        same = (((match & more) + more) ^ more) | match | less
        up = less | (columns & ~(same | more))
        down = more & same
        distance += bool(up & last) - bool(down & last)
        up = (up << 1 | 1) & columns
        more = (down << 1 & columns) | (columns & ~(same | up))
        less = up & same
    return distance
