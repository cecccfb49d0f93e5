"""`python -m loop.embedded`: writes the clinic's splits, or the corpus that its base was pre-trained on."""

import argparse
import json
from pathlib import Path

from loop.embedded.clinic import DATA, SPLITS, rows
from loop.embedded.corpus import write


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        text = "".join(json.dumps(row) + "\n" for row in rows(split))
        (args.out / f"{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
