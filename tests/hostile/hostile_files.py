"""The corpora of hostile adapters, rows of data and run folders: each is a whole one, changed."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from hostile_bases import Change, cut, edit, flip, put
from safetensors.numpy import load_file, save_file

CONFIG, WEIGHTS, TRAINED = "adapter_config.json", "adapter_model.safetensors", "trained.json"
PICKLE = b"\x80\x04cos\nsystem\n(S'touch CODE_RAN'\ntR."
NO_OBJECTS = ("", "[]", "5", "null", "{", "[" * 100_000, "\x00")
ADAPTER_FIELDS = {
    "base_model_name_or_path": (
        "../../../etc", "/etc/passwd", 5, None, [], "", "-x", "a b", "\x1b[31mred", "x/../..",
        "file:///etc/passwd", "http://127.0.0.1:9/x",
    ),
    "auto_mapping": ({"base_model_class": "C", "parent_library": "os"}, 5),
    "peft_type": ("PROMPT_TUNING", "IA3", "X", 5),
    "task_type": ("SEQ_CLS", "X", 5),
    "r": (0, -1, 10**9, 2**40, "8", 1.5, []),
    "lora_alpha": ("x", None, []),
    "lora_dropout": ("x", 5, None),
    "target_modules": ("(", 5, [5], [], None, "nothing", "(a+a+)+b", "(.*.*.*.*)*!"),
    "modules_to_save": (["lm_head"], 5, "os"),
    "rank_pattern": ({"(": 1}, 5, {".*": 10**9}),
    "layers_to_transform": ("x", [99], -1),
    "use_dora": (True, "x"),
    "bias": ("all", 5),
    "init_lora_weights": ("pissa", 5),
    "revision": (5, "../x", []),
}  # fmt: skip
TRAINED_FIELDS = {
    "base": (5, "../../etc", None),
    "method": ("x", 5, None),
    "dtype": ("os", 5, None, "int8"),
    "double_quant": ("x",),
    "storage": (5, "x"),
    "sha256": (5, "0" * 64),
    "base_fingerprint": ([], "0"),
    "generation": (5, {"max_new_tokens": "x"}),
    "revision": (5,),
    "data": (5, {"train": 5}),
    "prompt": ("x", {"system": 5}),
    "started_from": (5,),
}


def replace(name: str, data: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(data) and None


def weights(change: Callable[[dict[str, np.ndarray]], object]) -> Change:
    """A change of an adapter's tensors, which come without a hash, as from elsewhere."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)
        (folder / TRAINED).unlink()

    return apply


def _pickle_in_place_of_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(PICKLE)


def adapters() -> Iterator[tuple[str, Change]]:
    """(name, change of a copy of an adapter) of each hostile adapter."""
    yield "a pickle", _pickle_in_place_of_weights
    yield "a pickle by the weights' name", replace(WEIGHTS, PICKLE)
    yield "NaN", weights(lambda found: next(iter(found.values())).fill(np.nan))
    yield "a missing tensor", weights(lambda found: found.popitem())
    yield "no tensor", weights(lambda found: found.clear())
    for file, fields in ((CONFIG, ADAPTER_FIELDS), (TRAINED, TRAINED_FIELDS)):
        for key, values in fields.items():
            for value in values:
                yield f"{file} {key}={str(value)[:30]}", edit(file, **{key: value})
        for text in NO_OBJECTS:
            yield f"{file} is {text[:8]!r}", put(file, text)
    for keep in (0, 0.5, 0.99):
        yield f"weights cut at {keep}", cut(WEIGHTS, keep)
    for seed in range(8):
        yield f"weights bit {seed}", flip(WEIGHTS, seed)
        yield f"{CONFIG} bit {seed}", flip(CONFIG, seed)


ROW = {"id": "1", "dialogue": "Doctor: Pain?\nPatient: No.", "soap": "S: No pain."}
VALUES = (
    "\ud800", "a\udfffb", "\x00", "\x1b[31mred\x1b[0m", "../../x", "/etc/passwd", "", " ", 5, None,
    [], {}, True, 1.5, "<script>alert(1)</script>", "\u202egpj", "a\u2028b", "{{ 1 / 0 }}",
    "{% for %}", "<s></s><pad>", "x" * 100_000, "\ufeff", "=1+1", "\r\n", "-", "--help", "é" * 300,
)  # fmt: skip
RAW = {
    "no JSON": b"{",
    "an empty file": b"",
    "a list": b"[1, 2]",
    "deep": b'{"id": ' + b"[" * 100_000,
    "a number of 5,000 digits": b'{"id": ' + b"9" * 5000 + b', "dialogue": "a", "soap": "b"}',
    "NaN": b'{"id": NaN, "dialogue": "a", "soap": "b"}',
    "latin-1": b'{"id": "\xe9", "dialogue": "a", "soap": "b"}',
    "UTF-16": json.dumps(ROW).encode("utf-16"),
    "keys twice": b'{"id": "1", "id": "2", "dialogue": "a", "soap": "b"}',
    "NULs": b"\x00" * 1000,
    "a pickle": PICKLE,
}


def rows() -> Iterator[tuple[str, bytes]]:
    """(name, content) of each file of hostile rows, two whole ones among them."""
    whole = [json.dumps(ROW | {"id": name}).encode() for name in ("a", "b")]
    for key in ROW:
        for value in VALUES:
            changed = json.dumps(ROW | {key: value}).encode()
            yield f"{key}={ascii(value)[:30]}", b"\n".join([*whole, changed])
        partial = {other: value for other, value in ROW.items() if other != key}
        yield f"no {key}", b"\n".join([*whole, json.dumps(partial).encode()])
    for name, content in RAW.items():
        yield name, content
        yield f"{name}, after rows", b"\n".join([*whole, content])


def _newest(folder: Path) -> Path:
    return sorted((folder / "checkpoints").glob("step-*"))[-1]


def _in_newest(change: Change) -> Change:
    return lambda folder: change(_newest(folder))


def _all_cut(folder: Path) -> None:
    for path in (folder / "checkpoints").glob("step-*"):
        cut("state-00000.safetensors", 0.5)(path)


def _swapped(folder: Path) -> None:
    first, *_, last = sorted((folder / "checkpoints").glob("step-*"))
    for name in ("state-00000.safetensors", "manifest.json"):
        text = (first / name).read_bytes()
        (first / name).write_bytes((last / name).read_bytes())
        (last / name).write_bytes(text)


def _older_state(folder: Path) -> None:
    first, *_, last = sorted((folder / "checkpoints").glob("step-*"))
    shutil.copy(first / "state-00000.safetensors", last / "state-00000.safetensors")


def _links_outside(folder: Path) -> None:
    state = _newest(folder) / "state-00000.safetensors"
    state.rename(folder.parent / "outside.safetensors")
    state.symlink_to(folder.parent / "outside.safetensors")


def link(name: str) -> Change:
    """A link to a file outside, which must stay as it is."""

    def change(folder: Path) -> None:
        (folder.parent / "victim").write_text("mine")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        os.symlink(folder.parent / "victim", folder / name)

    return change


def runs() -> Iterator[tuple[str, Change]]:
    """(name, change of a copy of a run's folder) of each hostile run."""
    for file in ("manifest.json", "state-00000.safetensors"):
        for seed in range(8):
            yield f"{file} bit {seed}", _in_newest(flip(file, seed))
        for keep in (0, 0.5, 0.99):
            yield f"{file} cut at {keep}", _in_newest(cut(file, keep))
    for text in NO_OBJECTS:
        yield f"manifest.json is {text[:8]!r}", _in_newest(put("manifest.json", text))
    for key, value in (("step", 10**9), ("files", {}), ("rng", 5), ("identity", 5), ("best", 5)):
        yield f"manifest.json {key}={value}", _in_newest(edit("manifest.json", **{key: value}))
    yield "every checkpoint is cut", _all_cut
    yield "two checkpoints are swapped", _swapped
    yield "the state of an older step", _older_state
    yield "the state is a link to outside", _links_outside
    for name in (".lock", "config.yaml", "metrics.jsonl", "report.json", "data.json"):
        yield f"{name} is a link", link(name)
    for name in ("metrics.jsonl", "report.json", "config.yaml"):
        for text in ("", "{", "[" * 1000, '{"step": "x"}\n5\n', "\x00\xff"):
            yield f"{name} is {text[:8]!r}", put(name, text)
