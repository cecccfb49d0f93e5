"""No dead keys and no dead names.

Every field of the configuration is read, and what docstrings, comments, messages and README files
name is there.
"""

import ast
import dataclasses
import io
import json
import re
import tokenize
from keyword import iskeyword
from pathlib import Path
from pydoc import locate

import deepspeed
import pytest
from deepspeed.runtime import constants
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from helpers import LAUNCH_COMMANDS, ROOT
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from loop.config.cli import RENAMED
from loop.config.schema import (
    Config,
    DataConfig,
    GenerationSettings,
    MonitorConfig,
    RunConfig,
    TaskConfig,
)

SECTIONS = {
    "config": Config,
    "data": DataConfig,
    "task": TaskConfig,
    "run": RunConfig,
    "monitor": MonitorConfig,
    "generation": GenerationSettings,
}
DS, SHELL = ((ROOT / name).read_text() for name in ("ds_config.json", "launch.sh"))
PATHS = [
    p.relative_to(ROOT).as_posix()
    for pattern in ("loop/**/*", "kernels_check/*", "tests/**/*", "*")
    for p in ROOT.glob(pattern)
]
SOURCES = {
    path: (ROOT / path).read_text()
    for path in sorted(PATHS)
    if re.fullmatch(r"(loop|kernels_check)/.*\.py", path)
}
PAGES = {path: (ROOT / path).read_text() for path in sorted(PATHS) if path.endswith("README.md")}
NODES = {path: list(ast.walk(ast.parse(text))) for path, text in SOURCES.items()}
TEXTS = {
    path: [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    for path, nodes in NODES.items()
}
# Libraries whose names docstrings give without their home.
LIBRARIES = (deepspeed, deepspeed.utils, PreTrainedTokenizerBase)
FILES = "py sh json jsonl yaml txt safetensors".split()


def unread(sections: dict, nodes: list[ast.AST]) -> set[str]:
    """The fields that are nowhere read as SECTION.FIELD.

    Such as `config.lr`, `self.config.data.limit` or `data.limit`.
    """
    loads = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)]
    reads = {(getattr(n.value, "attr", getattr(n.value, "id", "")), n.attr) for n in loads}
    return {
        f"{name}.{field}"
        for name, section in sections.items()
        for field in section.model_fields
        if (name, field) not in reads
    }


def prose(path: str) -> str:
    """The comments and docstrings of a file."""
    comments = [
        t.string
        for t in tokenize.generate_tokens(io.StringIO(SOURCES[path]).readline)
        if t.type == tokenize.COMMENT
    ]
    documented = [
        n for n in NODES[path] if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))
    ]
    return "\n".join([*comments, *(ast.get_docstring(n) or "" for n in documented)])


def defined(path: str) -> set[str]:
    """Functions, methods, classes, fields, and what is assigned at the top of a file."""
    found = {n.name for n in NODES[path] if isinstance(n, (ast.ClassDef, ast.FunctionDef))}
    for node in NODES[path]:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    for part in NODES[path][0].body:
        if isinstance(part, ast.Assign):
            found |= {n.id for n in ast.walk(part) if isinstance(n, ast.Name)}
    return found


DEFINED = {path: defined(path) for path in SOURCES}
# Attributes are often a library's, such as `quant_state`.
ATTRIBUTES = {n.attr for nodes in NODES.values() for n in nodes if isinstance(n, ast.Attribute)}
EVERYWHERE = ATTRIBUTES.union(
    *DEFINED.values(), re.findall(r"\w+", DS), (Path(path).stem for path in SOURCES)
)
OPTIONS = (
    {t for texts in TEXTS.values() for t in texts if re.fullmatch(r"--[a-z][\w-]*", t)}
    | set(re.findall(r"--[a-z][\w-]*", SHELL))
    | {"--name"}
)


VARIABLES = {
    getattr(n, field, "")
    for nodes in NODES.values()
    for n in nodes
    for field in ("id", "arg")
    if isinstance(n, ast.arg) or isinstance(getattr(n, "ctx", None), ast.Store)
}


def known_keys() -> dict[str, set[str]]:
    """What may stand behind `NAME.`: a section's keys, what a module or package holds.

    Two modules of one name are taken together. A module that has the name of a variable, such as
    engine.py, is left out: `engine.step` is a method of DeepSpeed's.
    """
    known: dict[str, set[str]] = {}
    for path in map(Path, SOURCES):
        if path.stem not in VARIABLES:
            known.setdefault(path.stem, set()).update(DEFINED[path.as_posix()])
        for part, package in zip(path.parts[1:], path.parts):
            if package not in VARIABLES or package in SECTIONS:
                known.setdefault(package, {"NAME"}).add(part.removesuffix(".py"))
    for name, section in SECTIONS.items():
        known.setdefault(name, set()).update(section.model_fields)
    known["lora"] = {field.name for field in dataclasses.fields(LoraConfig)}
    return {name: {*keys, *FILES} for name, keys in known.items()}


KNOWN_KEYS = known_keys()


def dead_names(text: str, path: str) -> list[str]:
    """What stands as `name`, `a.name` or name() and is nowhere.

    It may be a name or key in this file, be defined in another, or be a library's.
    """
    names = re.findall(r"`([A-Za-z_][\w.]*)(?:\([^`]*\)|=\w+)?`", text)
    names += re.findall(r"\b([a-z_][\w.]*)\(\)", text)
    code = [
        str(getattr(n, field, ""))
        for n in NODES[path]
        for field in ("id", "attr", "name", "arg", "module")
    ]
    in_file = " ".join([*code, *(t for t in TEXTS[path] if " " not in t)])
    known = EVERYWHERE.union(FILES, re.findall(r"\w+", in_file))
    unknown = [n for n in names if not (n.split(".")[-1] in known or iskeyword(n) or "NAME" in n)]
    return [
        n
        for n in unknown
        if not (any(hasattr(library, n) for library in LIBRARIES) or ("." in n and locate(n)))
    ]


def dead_arguments(nodes: list[ast.AST]) -> list[str]:
    """What a docstring describes as "name: ..." and its function or class has not."""
    functions = [n for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    pattern = r"(?:^|[.;]\s+|\n\n|\n    )([a-z_]+): "
    dead = []
    for function in functions:
        names = {
            getattr(n, field, "") for n in ast.walk(function) for field in ("arg", "id", "attr")
        }
        described = re.findall(pattern, ast.get_docstring(function) or "")
        dead += [name for name in described if name not in names]
    return dead


def dead_keys(text: str) -> list[str]:
    """SECTION.FIELD and MODULE.NAME that neither the configuration nor the modules have."""
    pairs = re.findall(r"(?<![\w./-])([a-z]\w*)\.([A-Za-z]\w*)", text)
    unknown = [f"{head}.{last}" for head, last in pairs if last not in KNOWN_KEYS.get(head, {last})]
    # deepspeed.initialize is DeepSpeed's; old keys are the business of `old_keys`.
    return [name for name in unknown if not (name in RENAMED or locate(name))]


def old_keys(text: str) -> list[str]:
    """Keys that have another name now."""
    return [key for key in RENAMED if re.search(rf"`{re.escape(key)}(=[^`]*)?`", text)]


def dead_ways(text: str) -> list[str]:
    """Files, commands of launch.sh, modules behind `python -m`, and options that are not there."""
    files = re.findall(
        r"(?<![\w./-])(?:(?:loop|tests|kernels_check)/[\w/.]*\w|[\w/]+\.(?:py|sh))\b", text
    )
    modules = re.findall(
        r"(?:python -m|torchrun .* -m) ((?:loop|kernels_check)[\w.]*[a-z])\b", text
    )
    files += [name.replace(".", "/") for name in modules]
    known = [path.removesuffix(".py") for path in PATHS]
    dead = [f for f in files if not any(p.endswith(f.removesuffix(".py")) for p in known)]
    dead += set(re.findall(r"`\./launch\.sh ([a-z]+)\b(?!=)", text)) - set(LAUNCH_COMMANDS)
    options = re.findall(r"(?<![\w-])--[a-z][\w-]*", text)
    return dead + [option for option in options if option not in OPTIONS]


def test_every_key_is_read():
    nodes = [n for path in SOURCES if path != "loop/config/schema.py" for n in NODES[path]]
    # getattr(config.data, split) reads data.test
    assert unread(SECTIONS, nodes) == {"data.test"}


def test_a_key_that_nothing_reads_is_found():
    class More(MonitorConfig):
        new: int = 1

    code = "config.monitor.eval_steps; other.sample_notes[0]; other.new; monitor.new = 2"
    nodes = list(ast.walk(ast.parse(code)))
    unread_fields = {f"monitor.{name}" for name in More.model_fields} - {"monitor.eval_steps"}
    assert "monitor.new" in unread_fields
    assert unread({"monitor": More}, nodes) == unread_fields


def test_the_keys_of_deepspeeds_file_are_deepspeeds():
    ds = json.loads(DS)
    DeepSpeedZeroConfig(**ds.pop("zero_optimization"))  # both refuse a key that they don't know
    assert ds.pop("bf16") == {"enabled": "auto"}  # filled in by build_ds_config
    DeepSpeedBF16Config(enabled=True)
    assert {*ds, *ds["data_types"]} <= {
        value for value in vars(constants).values() if isinstance(value, str)
    }


@pytest.mark.parametrize("path", SOURCES)
def test_what_a_file_names_is_there(path):
    text = prose(path)
    assert dead_names(text, path) == []
    assert dead_arguments(NODES[path]) == []
    assert dead_keys("\n".join([text, *TEXTS[path]])) == []
    assert dead_ways(text) == []
    assert old_keys(text) == []


@pytest.mark.parametrize("path", PAGES)
def test_what_a_page_names_is_there(path):
    """Names in backticks are looked up by tests/test_readme.py."""
    prose_of_page = re.sub(r"^```.*?^```", "", PAGES[path], flags=re.S | re.M)
    spans = "\n".join(re.findall(r"`([^`]+)`", prose_of_page))
    files = [span for span in spans.splitlines() if not span.startswith(("./launch.sh", "--"))]
    assert dead_keys(spans) == []
    assert dead_ways("\n".join(files)) == []
    assert old_keys(prose_of_page) == []


def test_what_is_not_there_is_found():
    path = "loop/data/batch_plan.py"
    text = (
        "`make_plans`, `split_step(x)`, `data.folds`, gone_too(); batch_plan.split_step, "
        "batch_plan.gone; loop/gone.py, `./launch.sh trane --fast`, python -m loop.gone; "
        "`keep_whole=1`"
    )
    assert dead_names(text, path) == ["make_plans", "data.folds", "keep_whole", "gone_too"]
    assert dead_keys(text) == ["data.folds", "batch_plan.gone", "loop.gone"]
    assert dead_ways(text) == ["loop/gone.py", "loop/gone", "trane", "--fast"]
    assert old_keys(text) == ["keep_whole"]
    assert dead_arguments(list(ast.walk(ast.parse("def f(a):\n    'a: this; b: that'")))) == ["b"]
