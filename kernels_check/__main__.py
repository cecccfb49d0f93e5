"""`python -m kernels_check [--json FILE]`: every check, one table. Exit 0 where QLoRA training can start, 1 where it can't."""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from kernels_check.run import run_all
from kernels_check.table import table
from loop.kernels import check_results as verdicts


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels_check", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    target, start = parser.parse_args().json, time.perf_counter()
    rows = run_all()
    print(table(rows))
    blocking = [row.what for row in rows if row.blocks()]
    verdict = (
        f"QLoRA training can't start: {', '.join(blocking)}"
        if blocking
        else "QLoRA training can start"
    )
    try:
        kept = f"The loop will go by this table, kept in {verdicts.save(map(asdict, rows))}"
    except OSError as error:
        kept = f"The loop will not know: {error}"
    print(f"\n{verdict} ({time.perf_counter() - start:.0f} s). {kept}")
    if target:
        target.write_text(
            json.dumps({"can_start": not blocking, "rows": [asdict(row) for row in rows]}, indent=1)
            + "\n"
        )
    return 1 if blocking else 0


if __name__ == "__main__":
    raise SystemExit(main())
