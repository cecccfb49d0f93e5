"""The dataset report: how many rows were read, and which became no example and why."""

import dataclasses

MAX_LISTED = 8  # rows or ids that a line names


@dataclasses.dataclass
class DatasetReport:
    """What became of every row that was read: kept + skipped + dropped = rows."""

    rows: int
    kept: int
    skipped: list[str]  # bad rows, each with its file, row, id and remedy
    dropped: list[str]  # ids of examples longer than max_seq_len
    truncated: list[str]  # ids of kept examples whose dialogue was shortened to fit
    without_headings: int  # notes of kept examples that lack the task's headings, in order
    plain_template: bool  # the base has no chat template, so the project's own was used
    headings: str = ""  # of the task, as a line names them
    notes_changed: list[str] = dataclasses.field(default_factory=list)  # ids: see `note_change`
    notes_lost: int = 0  # those of them that lose more than white space
    duplicates: int = 0  # kept examples that repeat an earlier one, token for token
    with_markup: int = 0  # kept examples whose texts hold HTML
    notes_normalized: int = 0  # notes whose headings data.normalize_headings rewrote
    headings_normalized: int = 0  # the headings in them
    # Ids of kept examples by the kind of identifier that they hold, as `find_identifiers` names it.
    identifiers: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def lines(self, split: str, max_seq_len: int) -> list[str]:
        """The report as lines of a run's output; [] where every row became an example."""
        lines = []
        if self.skipped:
            lines.append(self._line("skipped", "bad rows", self.skipped, split, "\n            "))
        if self.dropped:
            reason = f"longer than {max_seq_len:,} tokens"
            lines.append(self._line("dropped", reason, self.dropped, split))
        if self.truncated:
            reason = "dialogues shortened to fit"
            lines.append(self._line("truncated", reason, self.truncated, split))
        if self.without_headings:
            lines.append(
                f"headings    {self.without_headings:,} of {self.kept:,} notes in data.{split} "
                f"lack {self.headings} in this order, each beginning a line and with a text "
                "(data.normalize_headings reads other styles)"
            )
        if self.notes_normalized:
            lines.append(
                f"normalized  {self.headings_normalized:,} headings of {self.notes_normalized:,} "
                f"notes in data.{split} are written as {self.headings} now"
            )
        if self.notes_changed:
            reason = (
                f"the tokenizer writes their notes otherwise ({self.notes_lost:,} lose letters)"
            )
            lines.append(self._line("tokenizer", reason, self.notes_changed, split))
        if self.duplicates:
            lines.append(
                f"duplicates  {self.duplicates:,} of {self.kept:,} examples in data.{split} "
                "repeat an earlier one word for word, and count twice"
            )
        if self.with_markup:
            lines.append(
                f"markup      {self.with_markup:,} of {self.kept:,} examples in data.{split} hold "
                "HTML (&amp;, <br>), which a model learns to write; remove it from the texts"
            )
        for kind, ids in self.identifiers.items():
            reason = f"a {kind} in it (data.identifiers)"
            lines.append(self._line("identifiers", reason, ids, split))
        if self.plain_template:
            lines.append(
                "template    the base has no chat template; the project's plain one is used, "
                "in training and generation"
            )
        return lines

    def _line(
        self, title: str, reason: str, names: list[str], split: str, separator: str = ", "
    ) -> str:
        """How many rows that were, and the first of them."""
        listed = separator.join(names[:MAX_LISTED])
        more = " ..." if len(names) > MAX_LISTED else ""
        return (
            f"{title:11} {len(names):,} of {self.rows:,} in data.{split}, {reason}: {listed}{more}"
        )
