"""No dead knobs and no dead names: every field of the configuration is read, and what docstrings, comments and messages name is there."""

import ast
import io
import json
import re
import tokenize
from keyword import iskeyword
from pathlib import Path
from pydoc import locate

import deepspeed
from deepspeed.runtime import constants
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from helpers import ROOT
from transformers import PreTrainedTokenizerBase

from loop.config.schema import Config, DataConfig, MonitorConfig, RunConfig

SECTIONS = {"config": Config, "data": DataConfig, "run": RunConfig, "monitor": MonitorConfig}
DS, SHELL = ((ROOT / name).read_text() for name in ("ds_config.json", "launch.sh"))
PATHS = [
    p.relative_to(ROOT).as_posix()
    for place in ("loop/**/*", "kernels_check/*", "tests/**/*", "*")
    for p in ROOT.glob(place)
]
SOURCES = {
    path: (ROOT / path).read_text()
    for path in PATHS
    if re.fullmatch(r"(loop|kernels_check)/.*\.py", path)
}
NODES = {path: list(ast.walk(ast.parse(text))) for path, text in SOURCES.items()}
TEXTS = {
    path: [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    for path, nodes in NODES.items()
}
LIBRARIES = (
    deepspeed,
    deepspeed.utils,
    PreTrainedTokenizerBase,
)  # whose names docstrings give without their home
FILES = "py sh json jsonl yaml txt safetensors".split()


def unread(sections: dict, nodes: list[ast.AST]) -> set[str]:
    """The fields that are nowhere read as SECTION.FIELD: `config.lr`, `self.config.data.limit`, `data.limit`."""
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
    found |= {
        n.target.id
        for n in NODES[path]
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    }
    return found | {
        n.id
        for part in NODES[path][0].body
        if isinstance(part, ast.Assign)
        for n in ast.walk(part)
        if isinstance(n, ast.Name)
    }


DEFINED = {path: defined(path) for path in SOURCES}
EVERYWHERE = set().union(
    *DEFINED.values(), re.findall(r"\w+", DS), (Path(path).stem for path in SOURCES)
)
OPTIONS = (
    {t for texts in TEXTS.values() for t in texts if re.fullmatch(r"--[a-z][\w-]*", t)}
    | set(re.findall(r"--[a-z][\w-]*", SHELL))
    | {"--name"}
)


def dead_names(text: str, path: str) -> list[str]:
    """What stands as `name`, `a.name` or name() and is neither a name or key in this file, nor defined in another, nor a library's."""
    names = re.findall(r"`([A-Za-z_][\w.]*)(?:\([^`]*\)|=\w+)?`", text) + re.findall(
        r"\b([a-z_][\w.]*)\(\)", text
    )
    code = [
        str(getattr(n, field, ""))
        for n in NODES[path]
        for field in ("id", "attr", "name", "arg", "module")
    ]
    known = EVERYWHERE.union(
        FILES, re.findall(r"\w+", " ".join([*code, *(t for t in TEXTS[path] if " " not in t)]))
    )
    unknown = [n for n in names if not (n.split(".")[-1] in known or iskeyword(n) or "NAME" in n)]
    return [
        n
        for n in unknown
        if not (any(hasattr(place, n) for place in LIBRARIES) or ("." in n and locate(n)))
    ]


def dead_arguments(nodes: list[ast.AST]) -> list[str]:
    """What a docstring describes as "name: ..." and its function or class has not."""
    functions = [n for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    described = [
        (n, name)
        for n in functions
        for name in re.findall(r"(?:^|[.;]\s+|\n\n)([a-z_]+): ", ast.get_docstring(n) or "")
    ]
    return [
        name
        for n, name in described
        if name
        not in {getattr(x, field, "") for x in ast.walk(n) for field in ("arg", "id", "attr")}
    ]


def dead_keys(text: str, path: str) -> list[str]:
    """SECTION.FIELD and MODULE.NAME that neither the configuration nor the modules beside this one have."""
    known = {name: {*FILES, *section.model_fields} for name, section in SECTIONS.items()}
    for beside in (other for other in SOURCES if Path(other).parent == Path(path).parent):
        known[Path(beside).stem] = DEFINED[beside].union(FILES, known.get(Path(beside).stem, ()))
    pairs = re.findall(r"(?<![\w./-])([a-z]\w*)\.([A-Za-z]\w*)", text)
    return [f"{head}.{last}" for head, last in pairs if last not in known.get(head, {last})]


def dead_ways(text: str) -> list[str]:
    """Files, commands of launch.sh, modules behind `python -m`, and options that are not there."""
    files = re.findall(
        r"(?<![\w./-])(?:(?:loop|tests|kernels_check)/[\w/.]*\w|[\w/]+\.(?:py|sh))\b", text
    )
    files += [
        name.replace(".", "/")
        for name in re.findall(r"python -m ((?:loop|kernels_check)[\w.]*[a-z])\b", text)
    ]
    dead = [
        f
        for f in files
        if not any(p.removesuffix(".py").endswith(f.removesuffix(".py")) for p in PATHS)
    ]
    dead += set(re.findall(r"\./launch\.sh ([a-z]+)", text)) - set(
        re.search(r'commands="(.*)"', SHELL)[1].split()
    )
    return dead + [
        option for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text) if option not in OPTIONS
    ]


def test_every_knob_is_read():
    nodes = [n for path in SOURCES if path != "loop/config.py" for n in NODES[path]]
    assert unread(SECTIONS, nodes) == {
        "data.train",
        "data.test",
    }  # which getattr(config.data, split) reads


def test_a_knob_that_nothing_reads_is_found():
    class More(MonitorConfig):
        new: int = 1

    nodes = list(
        ast.walk(
            ast.parse(
                "config.monitor.eval_steps; monitor.sample_notes[0]; other.new; monitor.new = 2"
            )
        )
    )
    assert unread({"monitor": More}, nodes) == {"monitor.sample_max_new_tokens", "monitor.new"}


def test_the_keys_of_deepspeeds_file_are_deepspeeds():
    ds = json.loads(DS)
    DeepSpeedZeroConfig(**ds.pop("zero_optimization"))  # both refuse a key that they don't know
    DeepSpeedBF16Config(**ds.pop("bf16"))
    assert {*ds, *ds["data_types"]} <= {
        value for value in vars(constants).values() if isinstance(value, str)
    }


def test_what_the_files_name_is_there():
    for path in SOURCES:
        text = prose(path)
        assert (
            not dead_names(text, path)
            + dead_arguments(NODES[path])
            + dead_keys("\n".join([text, *TEXTS[path]]), path)
            + dead_ways(text)
        ), path


def test_what_is_not_there_is_found():
    text = "`make_plans`, `cut(x)`, `data.folds`, gone_too(); packing.cut, packing.gone; loop/gone.py, `./launch.sh trane --fast`, python -m loop.gone"
    assert dead_names(text, "loop/packing.py") == ["make_plans", "data.folds", "gone_too"]
    assert dead_keys(text, "loop/packing.py") == ["data.folds", "packing.gone"]
    assert dead_ways(text) == ["loop/gone.py", "loop/gone", "trane", "--fast"]
    assert dead_arguments(list(ast.walk(ast.parse("def f(a):\n    'a: this; b: that'")))) == ["b"]
