"""The examples of a run: sources, tokens and labels put together, with an account of every row, and kept for the next start."""

import dataclasses


@dataclasses.dataclass
class DatasetReport:
    """What became of every row that was read: kept + skipped + dropped = rows."""

    rows: int
    kept: int
    skipped: list[str]  # bad rows, each with its place and what to do about it
    dropped: list[str]  # ids of examples longer than max_seq_len
    truncated: list[str]  # ids of kept examples whose dialogue was shortened to fit
    without_headings: int  # notes, among those kept, that lack S, O, A and P in order
    plain_template: bool  # the base brings no chat template, so the project's own was used

    def lines(self, split: str, max_seq_len: int) -> list[str]:
        """What to say of it: nothing left out, nothing said."""
        told = []
        for what, ids in (
            ("skipped", self.skipped),
            ("dropped", self.dropped),
            ("truncated", self.truncated),
        ):
            if ids:
                why = {
                    "skipped": "bad rows",
                    "dropped": f"longer than {max_seq_len:,} tokens",
                    "truncated": "dialogues shortened to fit",
                }[what]
                joint = "\n            " if what == "skipped" else ", "
                told.append(
                    f"{what:11} {len(ids):,} of {self.rows:,} in data.{split}, {why}: {joint.join(ids[:8])}{' ...' if len(ids) > 8 else ''}"
                )
        if self.without_headings:
            told.append(
                f"headings    {self.without_headings:,} of {self.kept:,} notes in data.{split} lack S:, O:, A:, P: in this order"
            )
        if self.plain_template:
            told.append(
                "template    the base has no chat template; the project's plain one is used, in training and generation"
            )
        return told
