"""Writes the files of the embedded demo.

python -m loop.embedded dataset                              the clinic's train, valid, test files
python -m loop.embedded pretrain --rows N --out FILE.jsonl   chat rows to pre-train the base on
"""

import argparse
import json
from pathlib import Path

from .clinic import DATA, SPLITS, rows
from .corpus import write


def write_dataset(folder: Path) -> None:
    """Writes a file of JSON lines for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        text = "".join(json.dumps(row) + "\n" for row in rows(split))
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loop.embedded",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    dataset = commands.add_parser("dataset", help="write the train, valid and test files")
    dataset.add_argument("--out", type=Path, default=DATA)
    pretrain = commands.add_parser(
        "pretrain", help="write chat rows for the pre-training of the tiny base"
    )
    pretrain.add_argument("--rows", type=int, required=True)
    pretrain.add_argument("--out", type=Path, required=True)
    pretrain.add_argument("--seed", type=int, default=0)
    pretrain.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    if args.command == "pretrain":
        write(args.out, args.rows, args.seed, args.workers)
    else:
        write_dataset(args.out)


if __name__ == "__main__":
    main()
