"""`python -m kernels_check [--json FILE]`: every check, one table.

The exit code is 0 where QLoRA training can start, 1 where it can't.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from kernels_check.run import run_all
from kernels_check.table import table
from loop.kernels import check_results


def main() -> int:
    description = "Every check, one table. Exit 0 where QLoRA training can start, 1 where it can't."
    parser = argparse.ArgumentParser(prog="python -m kernels_check", description=description)
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    json_path = parser.parse_args().json
    start = time.perf_counter()
    rows = run_all()
    print(table(rows))
    blocking = [row.what for row in rows if row.blocks()]
    if blocking:
        summary = f"QLoRA training can't start: {', '.join(blocking)}"
    else:
        summary = "QLoRA training can start"
    try:
        saved = f"The loop will go by this table, kept in {check_results.save(map(asdict, rows))}"
    except OSError as error:
        saved = f"The loop will not know: {error}"
    print(f"\n{summary} ({time.perf_counter() - start:.0f} s). {saved}")
    if json_path:
        report = {"can_start": not blocking, "rows": [asdict(row) for row in rows]}
        json_path.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if blocking else 0


if __name__ == "__main__":
    raise SystemExit(main())
