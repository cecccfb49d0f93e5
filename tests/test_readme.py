"""What the README says can be typed, and what it points at is there."""

import ast
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap

import pytest
from helpers import ROOT, seed_profile

from loop.config.cli import load_config
from loop.config.schema import Config, ConfigError, Section
from loop.data.batch_plan import PackingSpec, plan_batches, split_step

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
]
BLOCKS = re.findall(r"^```\w+\n(.*?)^```", README, re.S | re.M)
PROSE = re.sub(r"^```\w+\n.*?^```", "", README, flags=re.S | re.M)
SPANS = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", PROSE)]
TREE = next(block for block in BLOCKS if block.startswith("runs/soap_qlora/"))
# Small enough for a test; a line of the README is run as it stands, with these at its end.
SHORTER = {
    "train": [
        "max_steps=2",
        "data.limit=8",
        "monitor.sample_max_new_tokens=8",
        "run.export_check_examples=0",
    ],
    "evaluate": ["data.limit=4", "monitor.sample_max_new_tokens=8"],
    "generate": ["--max-new-tokens", "16"],
}
ELSEWHERE = {
    "./launch.sh test": "this run",
    "./launch.sh check": "tests/kernels_check/test_kernels_check.py",
    "./launch.sh bench": "tests/bench/test_bench.py",
    "./launch.sh board": "tests/monitor/test_tensorboard.py",
    "./launch.sh profile": "tests/monitor/test_step_timer.py",
    "./launch.sh generate --adapter runs/mine/adapter --dialogue tests/dialogue.txt": "tests/commands/test_generate.py",
    "./launch.sh preview --step 0 --html preview.html": "tests/commands/test_preview.py",
    "./launch.sh audit --config runs/mine/config.yaml": "tests/export/test_audit.py",
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The tracked and new files of the checkout, as a fresh clone would have them."""
    folder = tmp_path_factory.mktemp("clone") / "soap"
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def test_the_commands_run_one_after_the_other(clone):
    assert {"./launch.sh", "./launch.sh test"} <= set(COMMANDS)
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"LOOP_PYTHON": sys.executable, "DS_ACCELERATOR": "cpu"}
    for line in COMMANDS:
        if line in ELSEWHERE:
            continue
        words = shlex.split(line)
        name = words[1] if len(words) > 1 else "train"
        done = subprocess.run(
            ["bash", *words, *SHORTER.get(name, [])],
            cwd=clone,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
        assert done.stdout.strip(), line
    assert (clone / "runs" / "embedded" / "adapter" / "adapter_model.safetensors").is_file()
    assert (clone / "runs" / "mine" / "merged" / "config.json").is_file()
    look_at_the_folders(clone / "runs" / "embedded", clone / "runs" / "mine")


def look_at_the_folders(trained, evaluated):
    """The README's tree against two runs: nothing of a run is missing in it, and what it names is there."""
    named = [line.split()[0] for line in TREE.splitlines()[1:] if line[2] != " "]
    assert {path.name for path in trained.iterdir()} <= {name.split("/")[0] for name in named}
    for name in named:
        assert name == "profile/" or list(evaluated.glob(re.sub(r"\d+", "*", name.rstrip("/")))), (
            name
        )  # tests/monitor/test_step_timer.py looks at that one
    tags = {
        tag
        for line in (trained / "metrics.jsonl").read_text().splitlines()
        for tag in json.loads(line)
        if tag != "step"
    }
    for group, _, tag in (tag.partition("/") for tag in tags):
        assert (
            f"{group}/*" in TREE
            or f"{group}/*_gib" in TREE
            or (f"{group}/" in TREE and re.search(rf"\b{tag}\b", TREE))
        ), tag


# Where a command's options are read. Any other word of a command line is a value, a placeholder or a key=value.
OPTIONS = {
    "train": "launch.sh loop/cli.py loop/verify.py",
    "profile": "launch.sh loop/cli.py",
    "setup": "launch.sh",
    "check": "kernels_check/__main__.py",
    "evaluate": "launch.sh loop/cli.py loop/evaluate.py loop/canaries.py",
    "audit": "loop/cli.py loop/audit.py",
    "plan": "loop/cli.py loop/plan.py",
    "preview": "loop/cli.py loop/preview.py",
    "generate": "loop/generate.py",
    "merge": "loop/merge.py",
    "board": "loop/board.py",
    "bench": "tests/bench/__main__.py",
    "break": "tests/broken/__main__.py",
}
KEY_VALUE = r"[a-z_]+(\.[a-z_]+)*=.*"


def is_key(dotted: str) -> bool:
    """Whether it is a key of the run's configuration, such as lora.r or data.train."""
    section, fields = dotted.split("."), Config.model_fields
    while section and section[0] in fields:
        field = fields[section.pop(0)].annotation
        if (
            not section
            or field is None
            or not (isinstance(field, type) and issubclass(field, Section))
        ):
            return not section or dotted.startswith(
                "lora."
            )  # load_config knows the fields of peft.LoraConfig
        fields = field.model_fields
    return False


def load(overrides: list[str]) -> None:
    """Placeholders of one letter stand for numbers."""
    load_config(
        [
            "--config",
            str(ROOT / "loop/configs/soap_qlora.yaml"),
            *(re.sub(r"=\d*[A-Z]$", "=1", o) for o in overrides),
        ]
    )


def typed() -> list[str]:
    """Every command line of the README: of its blocks, and those in the text."""
    lines = [line.strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in [*lines, *SPANS] if line.startswith("./launch.sh")]


def check_options(line: str) -> None:
    line = re.sub(r"\[(DIR|--config FILE|key=value \.\.\.)\]", r"\1", line)
    words = [
        word for word in shlex.split(line, comments=True)[1:] if word not in ("...", "key=value")
    ]
    known = re.search(r'commands="(.*)"', (ROOT / "launch.sh").read_text())[1].split()
    name = words.pop(0) if words and not re.match(f"-|{KEY_VALUE}", words[0]) else "train"
    assert name in known, f"{line}: no such command"
    overrides = [
        part
        for word in words
        for part in (word.split() if name == "bench" else [word])
        if re.fullmatch(KEY_VALUE, part)
    ]
    if name == "test":
        for word in words:
            assert word in ("-s", "-m", "-n", "0", "gpu", "slow") or (ROOT / word).is_file(), line
        return
    if name != "help":
        source = " ".join((ROOT / path).read_text() for path in OPTIONS[name].split())
    for word, following in zip(words, [*words[1:], ""]):
        if word.startswith("--"):
            assert re.search(rf"{word.split('=')[0]}(?![\w-])", source), (
                f"{line}: {word} is not known"
            )
            if word == "--config" and not re.match(r"runs/|FILE|$", following):
                assert (ROOT / following).is_file(), line
    load(overrides)


def test_every_command_line_has_known_options_and_keys():
    lines = typed()
    assert len(lines) > 50 and set(ELSEWHERE) <= set(COMMANDS)
    for line in lines:
        check_options(line)
    for wrong in (
        "./launch.sh trian",
        "./launch.sh plan --gpu 2",
        "./launch.sh lora.rank=8",
        "./launch.sh run.resum=true",
        "./launch.sh test x.py",
    ):
        with pytest.raises((AssertionError, ConfigError)):
            check_options(wrong)
    for module in re.findall(r"-m ((?:loop|kernels_check)\.\w+)", README):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


def test_torchruns_options_are_its_own():
    from torch.distributed.run import get_args_parser

    (line,) = re.findall(r"bin/torchrun (.*)", README)
    found = get_args_parser().parse_args(shlex.split(line))
    assert (found.module, found.training_script, found.nnodes, found.nproc_per_node) == (
        True,
        "loop.train",
        "2",
        "8",
    )
    assert (ROOT / found.training_script_args[1]).is_file()


def test_every_key_and_name_in_the_text_is_one():
    patterns = ("loop/**/*.py", "kernels_check/*.py", "tests/**/*.py", "*.*", "loop/configs/*")
    files = [path for pattern in patterns for path in ROOT.glob(pattern)]
    source = " ".join(
        path.read_text()
        for path in files
        if path.is_file() and path.name not in ("README.md", "test_readme.py")
    )
    words, keys = set(re.findall(r"\w+", source)), 0
    for span in SPANS:
        if span == "key=value":
            continue
        if re.fullmatch(KEY_VALUE, span):
            assert is_key(span.split("=")[0]), span
            if not span.endswith("="):
                load([*(["data.train=[a, b]"] if span.startswith("data.weights") else []), span])
            keys += 1
        elif re.fullmatch(r"(data|run|monitor|lora)\.\w+", span) and not span.endswith(".json"):
            assert is_key(span), span
            keys += 1
        elif found := re.fullmatch(
            r"(?:[a-z_]+/)?([a-z]\w*)(?:: .*|\.\*|/\*)?", span
        ):  # a name, `name: value`, `section.*` or a tag
            assert found[1] in words, span
    assert keys > 30
    table = README.split("| the run's YAML and `key=value` |")[1].split("| `ds_config.json` |")[0]
    assert set(re.findall(r"`(\w+)(?:\.\*)?`", table)) == set(
        Config.model_fields
    )  # one owner a knob: each key stands there


def test_the_hearts_diff_is_the_loop():
    (diff,) = re.findall(r"```diff\n(.*?)```", README, re.S)
    lines = [(line[0], line.split("  # ")[0][2:].rstrip()) for line in diff.splitlines()]
    loop = (ROOT / "loop" / "train.py").read_text()
    ours = {line.split("  # ")[0].strip() for line in loop.splitlines()}
    for sign, line in lines:
        assert sign == "-" or line.strip() in ours, line
    for signs in ("- ", "+ "):  # the plain loop; ours
        ast.parse("\n".join(line for sign, line in lines if sign in signs))
    inner = textwrap.dedent(
        "\n".join(line for sign, line in lines if sign in "+ ").split("set_lr(optimizer, lr)\n")[1]
    ).splitlines()
    step, at = (
        [
            line.split("  # ")[0].strip()
            for line in loop.split("def train_step")[1].split("\ndef ")[0].splitlines()
        ],
        0,
    )
    for line in inner:  # in the same order
        at = step.index(line.strip(), at) + 1


def test_the_batch_arithmetic():
    lengths = seed_profile(9250)
    plan = plan_batches(lengths, 8 * 2048, 42)
    said = README.split("The arithmetic of the seed configuration")[1].split("## ")[0]
    rows = re.findall(r"^\| (\d) \| (\d).*? \| (.*) \|$", said, re.M)
    said = said.replace("\n", " ")
    assert (
        len(rows) == 4
        and f"{lengths.sum() / 1e6:.2f} M tokens" in said
        and f"{len(plan)} steps" in said
        and f"{100 * plan.fill:.1f} %" in said
    )
    assert f"{len(plan[0])} examples" in said and f"{lengths[plan[0]].sum():,} tokens" in said
    for world_size, size, cuts in rows:
        packing = PackingSpec(int(size) * 2048, 2048)
        found = split_step(plan[0], lengths, int(world_size), packing)
        assert cuts == " / ".join(
            ", ".join(f"{lengths[part].sum():,}" for part in rank) for rank in found
        )


def test_what_the_readme_points_at_is_there():
    paths = {
        span
        for span in SPANS
        if re.fullmatch(r"(loop|tests|kernels_check)/[\w/.-]*|[\w.]+\.(sh|txt|toml)", span)
        and span != "table.txt"
    }
    paths |= set(re.findall(r"\]\(([^)#]+)\)", README)) | set(
        re.findall(r"\b(?:loop|tests|kernels_check)/[\w/]+\.\w+", README)
    )
    assert len(paths) > 60
    for path in paths - {"NAME.dialogue.txt", "NAME.note.txt"}:
        assert (ROOT / path).exists(), path
    for path, first, last in re.findall(
        r"((?:loop|tests|kernels_check)/[\w/]+\.py):(\d+)(?:-(\d+))?", README
    ):
        assert int(last or first) <= len((ROOT / path).read_text().splitlines()), path
    for name, path in re.findall(r"`(\w+)` \((loop/\w+\.py)\)", README):
        assert f"def {name}" in (ROOT / path).read_text(), name
    order = README.split("## Reading order")[1].split("\n## ")[0]
    for path in ROOT.glob("loop/*.py"):
        assert f"`loop/{path.name}`" in order or path.name == "__init__.py", path
    said = int(re.search(r"About (\d,\d00) lines", README)[1].replace(",", ""))
    assert (
        abs(sum(len(path.read_text().splitlines()) for path in ROOT.glob("loop/*.py")) - said) < 150
    )
    shown = runpy.run_path(str(ROOT / "tests" / "broken" / "shown.py"))["SHOWN"]
    assert len(shown) == 15 and README.count("fifteen classic mistakes") == 2
    assert "@" not in re.sub(r"\S+@(\S+\.\S+|\d+)", "", README), "a figure was not filled in"


def test_the_map_names_every_chapter():
    chapters = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-"): title
        for title in re.findall(r"^## (.*)$", PROSE, re.M)
    }
    links = {anchor: title for title, anchor in re.findall(r"\[([^\]]+)\]\(#([^)]+)\)", README)}
    assert set(links) == set(chapters) - {"two-commands"}
    for anchor, title in links.items():
        assert chapters[anchor].startswith(title), anchor
