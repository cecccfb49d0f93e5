"""What the README files say can be typed, and what they point at is there."""

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
from pathlib import Path

import numpy as np
import pytest
from helpers import LAUNCH_COMMANDS, PYTHON, ROOT, run, seed_profile

from loop.config.cli import load_config
from loop.config.help import COMMANDS as COMMANDS_HELP
from loop.config.schema import Config, ConfigError, Section
from loop.data.batch_plan import PackingSpec, plan_batches, split_step
from loop.data.sources.readers import READERS
from loop.evaluation.scoring import METRICS
from loop.kernels.attention import ATTENTION_BACKENDS
from loop.kernels.quantization import QUANTIZATIONS
from loop.optim.adamw import OPTIMIZERS
from loop.optim.schedule import SCHEDULES
from loop.sweep.grid import read_axes

PATHS = [ROOT / "README.md"] + sorted(
    path
    for path in ROOT.rglob("README.md")
    if path.parent != ROOT and path.relative_to(ROOT).parts[0] in ("loop", "kernels_check", "tests")
)
NAMES = [path.relative_to(ROOT).as_posix() for path in PATHS]
PAGES = {name: path.read_text() for name, path in zip(NAMES, PATHS)}
README, TOUR = PAGES["README.md"], PAGES["loop/README.md"]
ALL = "\n\n".join(PAGES.values())
MOST_LINES, MOST_COLUMNS = 250, 120

FENCE = r"^```\w+\n(.*?)^```"
COMMANDS = list(
    dict.fromkeys(
        line.split("  #")[0].strip()
        for block in re.findall(r"```bash\n(.*?)```", ALL, re.S)
        for line in block.splitlines()
    )
)
BLOCKS = re.findall(FENCE, ALL, re.S | re.M)
PROSE = {
    name: re.sub(r"^```\w+\n.*?^```", "", text, flags=re.S | re.M) for name, text in PAGES.items()
}
SPANS = [
    " ".join(span.split()) for text in PROSE.values() for span in re.findall(r"`([^`]+)`", text)
]
TREE = next(block for block in BLOCKS if block.startswith("runs/soap_qlora/"))
EXAMPLES = re.findall(r"^### (A[n]? .*?)\n.*?^```python\n(.*?)^```", TOUR, re.S | re.M)

# Small enough for a test; a command is run as it stands, with these at its end.
SHORTER = {
    "train": [
        "max_steps=2",
        "data.limit=8",
        "generation.max_new_tokens=8",
        "run.export_check_examples=0",
    ],
    "evaluate": ["data.limit=4", "generation.max_new_tokens=8"],
    "generate": ["--max-new-tokens", "16"],
}
ELSEWHERE = {
    "./launch.sh test": "this run",
    "./launch.sh check": "tests/kernels_check/test_kernels_check.py",
    "./launch.sh bench": "tests/bench/test_bench.py",
    "./launch.sh board": "tests/monitor/test_tensorboard.py",
    "./launch.sh profile": "tests/monitor/test_step_timer.py",
    "./launch.sh generate --adapter runs/mine/adapter --dialogue tests/dialogue.txt": (
        "tests/commands/test_generate.py"
    ),
    "./launch.sh export --model runs/mine/merged --gguf q8_0 --out runs/mine/gguf": (
        "tests/gguf/test_writer.py"
    ),
    "./launch.sh preview --step 0 --html preview.html": "tests/commands/test_preview.py",
    "./launch.sh audit --config runs/mine/config.yaml": "tests/export/test_audit.py",
}


# ---- commands


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The tracked and new files of the checkout, as a new clone would have them."""
    folder = tmp_path_factory.mktemp("clone") / "soap"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\n")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def test_the_commands_run_one_after_the_other(clone):
    assert {"./launch.sh", "./launch.sh test"} <= set(COMMANDS)
    assert set(ELSEWHERE) <= set(COMMANDS)
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"DS_ACCELERATOR": "cpu"}
    for line in COMMANDS:
        if line in ELSEWHERE:
            continue
        words = shlex.split(line)
        name = words[1] if len(words) > 1 else "train"
        python = sys.executable if line == "./launch.sh" else PYTHON  # the main job: as it comes
        command = ["bash", *words, *SHORTER.get(name, [])]
        done = run(command, cwd=clone, env=env | {"LOOP_PYTHON": python})
        assert done.returncode == 0, f"{line}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
        assert done.stdout.strip(), line
    assert (clone / "runs" / "embedded" / "adapter" / "adapter_model.safetensors").is_file()
    assert (clone / "runs" / "mine" / "merged" / "config.json").is_file()
    compare_with_tree(clone / "runs" / "embedded", clone / "runs" / "mine")


def compare_with_tree(trained: Path, evaluated: Path) -> None:
    """The tree has all that is in a run's folder, and what it names is in one of two runs."""
    named = [line.split()[0] for line in TREE.splitlines()[1:] if line[2] != " "]
    assert {path.name for path in trained.iterdir()} <= {name.split("/")[0] for name in named}
    for name in named:
        pattern = re.sub(r"\d+", "*", name.rstrip("/"))
        # tests/monitor/test_step_timer.py looks at profile/
        assert name == "profile/" or list(evaluated.glob(pattern)), name
    lines = (trained / "metrics.jsonl").read_text().splitlines()
    tags = {tag for line in lines for tag in json.loads(line) if tag != "step"}
    for tag in tags:
        group, _, last = tag.partition("/")
        all_of_them = f"{group}/*" in TREE or f"{group}/*_gib" in TREE
        assert all_of_them or (f"{group}/" in TREE and re.search(rf"\b{last}\b", TREE)), tag


KEY_VALUE = r"[a-z_]+(\.[a-z_]+)*=.*"


def is_key(dotted: str) -> bool:
    """Whether it is a key of the run's configuration, such as lora.r or data.train."""
    section, fields = dotted.split("."), Config.model_fields
    while section and section[0] in fields:
        field = fields[section.pop(0)].annotation
        if not (section and isinstance(field, type) and issubclass(field, Section)):
            # load_config knows the fields of peft.LoraConfig
            return not section or dotted.startswith("lora.")
        fields = field.model_fields
    return False


def load(overrides: list[str]) -> None:
    """Placeholders of one letter stand for numbers."""
    words = [re.sub(r"=\d*[A-Z]$", "=1", override) for override in overrides]
    load_config(["--config", str(ROOT / "loop/configs/soap_qlora.yaml"), *words])


def command_lines() -> list[str]:
    """Every command line of the pages: of their blocks, and those in the text."""
    lines = [
        line.strip() for block in BLOCKS for line in re.sub(r"\\\n\s*", " ", block).splitlines()
    ]
    return [line for line in [*lines, *SPANS] if line.startswith("./launch.sh")]


def check_options(line: str) -> None:
    line = re.sub(r"\[(DIR|--config FILE|key=value \.\.\.)\]", r"\1", line)
    words = shlex.split(line, comments=True)[1:]
    words = [word for word in words if word not in ("...", "key=value")]
    name = words.pop(0) if words and not re.match(f"-|{KEY_VALUE}", words[0]) else "train"
    assert name in LAUNCH_COMMANDS, f"{line}: no such command"
    parts = [part for word in words for part in (word.split() if name == "bench" else [word])]
    if name == "test" and words[:1] == ["--mutants"]:
        folder = ROOT / "tests/mutants"
        tables = "".join(path.read_text() for path in folder.glob("*.yaml"))
        runner = (folder / "__main__.py").read_text()
        words = [w for w in words[1:] if not (w.startswith("--") and f'"{w}"' in runner)]
        words = [w for w in words if not re.fullmatch(r"\d+|\w+\.jsonl", w)]
        assert all(word in tables for word in words), line
        return
    if name == "test":
        for word in words:
            assert word in ("-s", "-m", "-n", "0", "gpu", "slow") or (ROOT / word).exists(), line
        return
    if name == "help":
        assert not words, line
        return
    # tests/config/test_help.py holds the help against what each command reads.
    options = {"--help", *(option.split()[0] for option in COMMANDS_HELP[name].options)}
    if COMMANDS_HELP[name].takes_config:
        options.add("--config")
    for word, following in zip(words, [*words[1:], ""]):
        if word.startswith("--"):
            known_option = word.split("=")[0] in options
            assert known_option, f"{line}: {word} is not known"
            if word == "--config" and not re.match(r"runs/|FILE|$", following):
                assert (ROOT / following).is_file(), line
    keys = [part for part in parts if re.fullmatch(KEY_VALUE, part)]
    if name == "sweep" and keys:
        axes, keys = read_axes(keys)
        keys += [f"{key}={value}" for key, values in axes.items() for value in values]
    load(keys)


def test_every_command_line_has_known_options_and_keys():
    lines = command_lines()
    assert len(lines) > 50
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
    for module in re.findall(r"-m ((?:loop|kernels_check)\.[\w.]+)", ALL):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


def test_torchruns_options_are_its_own():
    from torch.distributed.run import get_args_parser

    (line,) = re.findall(r"bin/torchrun (.*)", ALL)
    found = get_args_parser().parse_args(shlex.split(line))
    assert found.module
    assert found.training_script == "loop.commands.train"
    assert (found.nnodes, found.nproc_per_node) == ("2", "8")
    assert (ROOT / found.training_script_args[1]).is_file()


# ---- names and keys


def test_every_key_and_name_in_the_text_is_one():
    patterns = ("loop/**/*.py", "kernels_check/*.py", "tests/**/*.py", "*.*", "loop/configs/*")
    files = [path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()]
    source = " ".join(
        path.read_text() for path in files if path.name not in ("README.md", "test_readme.py")
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
        # a name, `name: value`, `section.*` or a tag
        elif found := re.fullmatch(r"(?:[a-z_]+/)?([a-z]\w*)(?:: .*|\.\*|/\*)?", span):
            assert found[1] in words, span
    assert keys > 30


def test_each_key_has_its_owner_in_the_table():
    table = TOUR.split("| the run's YAML and `key=value` |")[1].split("| `ds_config.json` |")[0]
    assert set(re.findall(r"`(\w+)(?:\.\*)?`", table)) == set(Config.model_fields)


# ---- the tour


def green_and_red() -> list[tuple[str, str]]:
    (diff,) = re.findall(r"```diff\n(.*?)```", ALL, re.S)
    return [(line[0], line.split("  # ")[0][2:].rstrip()) for line in diff.splitlines()]


def test_the_hearts_diff_is_the_loop():
    lines = green_and_red()
    loop = (ROOT / "loop" / "train.py").read_text()
    ours = {line.split("  # ")[0].strip() for line in loop.splitlines()}
    for sign, line in lines:
        assert sign == "-" or line.strip() in ours, line
    for signs in ("- ", "+ "):  # the plain loop; ours
        ast.parse("\n".join(line for sign, line in lines if sign in signs))
    green = textwrap.dedent("\n".join(line for sign, line in lines if sign in "+ "))
    inner = green.split("set_lr(optimizer, lr)\n")[1].splitlines()
    step_source = loop.split("def train_step")[1].split("\ndef ")[0]
    step = [line.split("  # ")[0].strip() for line in step_source.splitlines()]
    at = 0
    for line in inner:  # in the same order
        at = step.index(line.strip(), at) + 1


def test_the_batch_arithmetic():
    lengths = seed_profile(9250)
    plan = plan_batches(lengths, 8 * 2048, 42)
    text = TOUR.split("The arithmetic of the seed configuration")[1].split("## ")[0]
    rows = re.findall(r"^\| (\d) \| (\d).*? \| (.*) \|$", text, re.M)
    assert len(rows) == 4
    for shown in (
        f"{lengths.sum() / 1e6:.2f} M tokens",
        f"{len(plan)} steps",
        f"{100 * plan.fill:.1f} %",
        f"{len(plan[0])} examples",
        f"{lengths[plan[0]].sum():,} tokens",
    ):
        assert shown in text, shown
    for world_size, size, parts in rows:
        packing = PackingSpec(int(size) * 2048, 2048)
        found = split_step(plan[0], lengths, int(world_size), packing)
        tokens = [[f"{lengths[part].sum():,}" for part in rank] for rank in found]
        assert parts == " / ".join(", ".join(rank) for rank in tokens)


@pytest.fixture
def registries():
    """What an example registers is gone after it."""
    tables = (
        READERS,
        METRICS,
        ATTENTION_BACKENDS,
        QUANTIZATIONS,
        OPTIMIZERS,
        SCHEDULES,
    )
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before):
        table.clear()
        table.update(entries)


@pytest.mark.parametrize("code", [code for _, code in EXAMPLES], ids=[name for name, _ in EXAMPLES])
def test_a_worked_example_runs(code, registries, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(code.splitlines()) <= 40 and "assert " in code
    exec(compile(code, "loop/README.md", "exec"), {"__name__": "example", "np": np})


def test_there_is_an_example_for_each_seam():
    assert [name for name, _ in EXAMPLES] == [
        "A schedule",
        "An optimizer",
        "A data reader",
        "A quantisation",
        "An attention kernel",
        "A metric",
    ]


def test_every_module_is_described_on_some_page():
    for path in (ROOT / "loop").rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        if path.name != "__init__.py" and "embedded" not in name:
            assert f"`{name}`" in ALL, name


# ---- the pages


@pytest.mark.parametrize("name", NAMES)
def test_a_page_keeps_its_width(name):
    """A table's row and a block of code may be wider, but not on the first page."""
    in_code = False
    for number, line in enumerate(PAGES[name].splitlines(), 1):
        if line.startswith("```"):
            in_code = not in_code
        if name == "README.md" or not (in_code or line.startswith("|")):
            assert len(line) <= MOST_COLUMNS, f"{name}:{number}"


def test_the_first_page_is_short():
    assert len(README.splitlines()) <= MOST_LINES
    first_screen = "\n".join(README.splitlines()[:30])
    assert "board.png" in first_screen and "./launch.sh test" in first_screen


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def links(name: str) -> list[str]:
    """The targets of a page's links and pictures, those of the web left out."""
    text = PROSE[name]
    defined = dict(re.findall(r"^\[(\w+)\]: (\S+)$", text, re.M))
    targets = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    targets += [defined[label] for label in re.findall(r"\]\[(\w+)\]", text)]
    return [target for target in targets if not target.startswith("http")]


@pytest.mark.parametrize("name", NAMES)
def test_every_link_resolves(name):
    for target in links(name):
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(PROSE[file.resolve().relative_to(ROOT).as_posix()]), target


def test_the_first_page_links_every_other():
    map_of_pages = README.split("## All documents")[1].split("\n## ")[0]
    linked = set(re.findall(r"\]\(([^)#]+)\)", map_of_pages))
    assert linked == set(NAMES) - {"README.md"}


def test_what_the_pages_point_at_is_there():
    pattern = r"(loop|tests|kernels_check)/[\w/.-]*|[\w.]+\.(sh|txt|toml)"
    paths = {span for span in SPANS if re.fullmatch(pattern, span) and span != "table.txt"}
    paths |= set(re.findall(r"\b(?:loop|tests|kernels_check)/[\w/]+\.\w+", ALL))
    assert len(paths) > 100
    for path in paths - {"NAME.dialogue.txt", "NAME.note.txt"}:
        assert (ROOT / path).exists(), path
    for name, path in re.findall(r"`(\w+)` \((loop/[\w/]+\.py)\)", ALL):
        assert f"def {name}" in (ROOT / path).read_text(), name
    assert "@" not in re.sub(r"\S+@(\S+\.\S+|\d+)|@dataclass", "", ALL), "a number is missing"


def test_the_folders_of_the_tree_are_all():
    tree = README.split("## The tree")[1].split("```text\n")[1].split("```")[0]
    named = [line.split()[0] for line in tree.splitlines()]
    for name in named:
        assert (ROOT / name).exists(), name
    for path in (ROOT / "loop").iterdir():
        if path.is_dir() and path.name != "__pycache__":
            assert f"loop/{path.name}/" in named, path


def test_the_numbers_about_the_code():
    said = int(re.search(r"About ([\d,]+) lines", README)[1].replace(",", ""))
    files = [path for path in ROOT.glob("loop/**/*.py") if "embedded" not in path.parts]
    assert abs(sum(len(path.read_text().splitlines()) for path in files) - said) < 150
    evening = TOUR.split("## Reading order")[1].split("### ")[0]
    paths = re.findall(r"`(loop/[\w/]+\.py)`", evening)
    lines = sum(len((ROOT / path).read_text().splitlines()) for path in paths)
    assert abs(lines - int(re.search(r"some ([\d,]+) lines", evening)[1].replace(",", ""))) < 150
    shown = runpy.run_path(str(ROOT / "tests" / "broken" / "shown.py"))["SHOWN"]
    assert len(shown) == 15 and ALL.count("fifteen classic mistakes") == 2
