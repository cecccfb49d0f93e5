"""How long a run takes to read its data: rows of the seed's lengths, from the file to the plan.

`python tests/bench/rows.py ROWS FOLDER [key=value ...]`, twice: the second start finds the cache.
The rows are turns of the made-up clinic in random order; FOLDER keeps them and the cache. It prints
seconds, the process's CPU seconds and its peak memory. For two cores: taskset -c 0,1.
"""

import json
import random
import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from helpers import seed_profile  # noqa: E402

from loop.config.cli import load_config  # noqa: E402
from loop.data.batch_plan import plan_batches  # noqa: E402
from loop.data.dataset import load_training_data  # noqa: E402
from loop.model.loading import load_tokenizer  # noqa: E402

CHARACTERS_PER_TOKEN = 3.5
NOTE = 0.2  # of the text


def write_rows(path: Path, count: int) -> None:
    source = ROOT / "loop/embedded/data/train.jsonl"
    turns = [t for line in source.open() for t in json.loads(line)["dialogue"].split("\n")]
    rng = random.Random(0)
    with path.open("w") as file:
        for i, length in enumerate(seed_profile(count).tolist()):
            left, parts = length * CHARACTERS_PER_TOKEN, [f"Doctor: visit {i}"]
            while left > 0:
                parts.append(rng.choice(turns))
                left -= len(parts[-1])
            at = int(len(parts) * (1 - NOTE))
            row = {"id": f"r{i}", "dialogue": "\n".join(parts[:at])}
            note = f"S: {' '.join(parts[at:])}\nO: none\nA: pain\nP: rest"
            file.write(json.dumps(row | {"soap": note}) + "\n")


def main() -> None:
    count, folder = int(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rows-{count}.jsonl"
    if not path.exists():
        write_rows(path, count)
    own = [f"data.train={path}", "data.valid=null", "data.test=null", "monitor.sample_notes=[]"]
    own += ["max_seq_len=2048", f"run.dir={folder}", *sys.argv[3:]]
    config = load_config(["--config", str(ROOT / "loop/configs/embedded.yaml"), *own])
    tokenizer = load_tokenizer(config.base, config.revision)
    before, cpu_before = time.perf_counter(), time.process_time()
    data = load_training_data(config, tokenizer)
    plan = plan_batches(data.lengths, config.tokens_per_step, config.seed, config.epochs)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{count:,} rows, {path.stat().st_size / 1e9:.2f} GB, {data.lengths.sum() / 1e6:,.0f} M "
        f"tokens in {len(plan):,} steps: {time.perf_counter() - before:.1f} s, "
        f"{time.process_time() - cpu_before:.1f} s of CPU, peak {memory:.2f} GiB"
    )


if __name__ == "__main__":
    main()
