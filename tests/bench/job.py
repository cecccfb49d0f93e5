"""`./launch.sh bench --job`: the seed job as a person waits for it, and which part takes how long.

It makes a base with random weights and rows of the seed's lengths, runs `./launch.sh train` on
them, and shows where its seconds went: from the command to the end of the process.
"""

import json
import random
import re
import shutil
import subprocess
import time
from pathlib import Path

from shapes import DEVIATION, LONGEST, MEAN, ROOT, SUPERVISED, make_base

from loop.config.device import uses_gpu
from loop.distributed.timeline import START

CORPUS = ROOT / "loop" / "embedded" / "data" / "train.jsonl"
FRAME = 110  # tokens of the prompt's own words
SPEAKER = 2  # tokens of who speaks, and of the line's end
STEPS = ("first step", "steps")
# What a CPU runs in a minute or two; every part of the job is there.
SMALL = (
    "max_seq_len=512 batch_size=2 max_steps=8 monitor.eval_steps=4 run.save_steps=4 "
    "generation.max_new_tokens=16 warmup_steps=0"
).split()


def read_sentences() -> list[list[str]]:
    """What is said in the made-up clinic's dialogues, and what is noted, each once."""
    said: set[str] = set()
    noted: set[str] = set()
    for line in CORPUS.read_text().splitlines():
        row = json.loads(line)
        said.update(turn.split(": ", 1)[-1] for turn in row["dialogue"].splitlines())
        noted.update(re.split(r"(?<=\.) ", row["soap"].replace("\n", " ")))
    return [sorted(said), sorted(sentence for sentence in noted if ":" not in sentence)]


def draw_sentences(
    sentences: list[str], lengths: list[int], budget: float, draw: random.Random
) -> list[str]:
    """Sentences in random order that fill a budget of tokens. lengths: of each sentence."""
    drawn = []
    while budget > 0:
        i = draw.randrange(len(sentences))
        drawn.append(sentences[i])
        budget -= lengths[i]
    return drawn


def make_rows(folder: Path, tokenizer, sizes: dict[str, int], longest: int) -> dict[str, Path]:
    """Writes a JSONL file for each split and returns the paths; the next call finds them there.

    Token lengths follow the seed's, scaled to `longest`; about a quarter is the note.
    """
    paths = {split: folder / f"{split}-{n}-{longest}.jsonl" for split, n in sizes.items()}
    if all(path.is_file() for path in paths.values()):
        return paths
    said, noted = (
        (pool, [len(ids) + more for ids in tokenizer(pool, add_special_tokens=False)["input_ids"]])
        for pool, more in zip(read_sentences(), (SPEAKER, 0))
    )
    draw = random.Random(0)
    for split, path in paths.items():
        rows = []
        for number in range(sizes[split]):
            length = min(max(draw.gauss(MEAN, DEVIATION), 300), LONGEST - 100) * longest / LONGEST
            turns = draw_sentences(*said, (1 - SUPERVISED) * length - FRAME, draw)
            note = draw_sentences(*noted, SUPERVISED * length, draw)
            lines = [("Doctor: ", "Patient: ")[i % 2] + turn for i, turn in enumerate(turns)]
            parts = [f"{head}: {' '.join(note[i::4]) or 'None.'}" for i, head in enumerate("SOAP")]
            row = {"dialogue": "\n".join(lines), "soap": "\n".join(parts)}
            rows.append(json.dumps({"id": f"{split}-{number}"} | row) + "\n")
        path.write_text("".join(rows))
    return paths


def job_command(args, folder: Path) -> list[str]:
    """The command line of the job; base and rows are made if they are not there."""
    from loop.model.loading import load_tokenizer

    on_gpu = uses_gpu()
    base = make_base(args.shape, folder)
    train, other = args.rows or (9250 if on_gpu else 48), 250 if on_gpu else 6
    sizes = {"train": train, "valid": other, "test": other}
    paths = make_rows(folder, load_tokenizer(str(base)), sizes, LONGEST if on_gpu else 512)
    samples = "[valid-0,valid-1]" if on_gpu else "[valid-0]"
    return [
        *(str(ROOT / "launch.sh"), "train", "--config", str(ROOT / "loop/configs/soap_qlora.yaml")),
        *("--gpus", str(args.gpus)),
        f"base={base}",
        *(f"data.{split}={path}" for split, path in paths.items()),
        *(f"run.dir={folder / 'runs'}", "run.name=job", f"monitor.sample_notes={samples}"),
        *([] if on_gpu else SMALL),
        *args.overrides,
    ]


def run_job(command: list[str], folder: Path) -> dict:
    """Runs the job once: seconds in all, seconds by part, and what report.json says.

    Raises SystemExit with the end of its output where it fails.
    """
    run = folder / "runs" / "job"
    shutil.rmtree(run, ignore_errors=True)
    started = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.time() - started
    if done.returncode:
        raise SystemExit(f"the job ended with {done.returncode}: {done.stderr[-1000:]}")
    report = json.loads((run / "report.json").read_text())
    parts = report["time"]
    return {
        "seconds": seconds,
        "time": parts | {"end": seconds - sum(parts.values())},
        "to_first_step": report["time_to_first_step"],
        "num_steps": report["steps"],
        "tokens_per_second": report["train/tokens_per_second"],
    }


def ratio(job: dict) -> float:
    """The whole job without its start, as a multiple of its steps' own time."""
    steps = sum(job["time"].get(name, 0.0) for name in STEPS)
    return (job["seconds"] - sum(job["time"].get(name, 0.0) for name in START)) / steps


def as_table(jobs: list[dict]) -> str:
    """A line for each part, a column for each round, and the figures that have targets."""
    names = list(dict.fromkeys(name for job in jobs for name in job["time"]))
    rows = [(name, [f"{job['time'].get(name, 0.0):.1f}" for job in jobs]) for name in names]
    rows += [
        ("in all", [f"{job['seconds']:.1f}" for job in jobs]),
        ("first step after", [f"{sum(job['to_first_step'].values()):.1f}" for job in jobs]),
        ("without start : steps", [f"{ratio(job):.2f}" for job in jobs]),
        ("tokens/s of the steps", [f"{job['tokens_per_second']:,.0f}" for job in jobs]),
    ]
    head = f"{'seconds of':24}" + "".join(f"{f'start {i + 1}':>10}" for i in range(len(jobs)))
    return "\n".join([head, *(f"{name:24}" + "".join(f"{x:>10}" for x in v) for name, v in rows)])


def main(args) -> None:
    """args: of the bench's command line."""
    folder = Path(args.base_dir)
    folder.mkdir(parents=True, exist_ok=True)
    command = job_command(args, folder)
    jobs = []
    for _ in range(args.rounds):  # the first start tokenises and compiles, later ones find it
        jobs.append(run_job(command, folder))
        print(f"start {len(jobs)}: {jobs[-1]['seconds']:.1f} s", flush=True)
        if args.json:  # at once, as the next round may be cut off
            Path(args.json).write_text(json.dumps({"command": command, "jobs": jobs}, indent=1))
    steps = f"{jobs[0]['num_steps']} steps"
    print(f"\nthe seed job, {args.shape}, {args.gpus} rank(s), {steps}\n{as_table(jobs)}")
