"""From a source, as the configuration names it, to the rows of its files or of its data set.

A path never leaves the machine: only what looks like OWNER/NAME, and nothing else, is asked of the
hub. See `hub_id`.
"""

import collections
import dataclasses
import functools
import glob
import hashlib
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...config.schema import ROOT, Config, ConfigError, DataConfig
from ...untrusted.datasets import check_data_folder
from .readers import OPENERS, READERS, BadRow, Rows, format_of, read_text_pairs

if TYPE_CHECKING:  # its import takes nearly a second, and files need none of it
    import datasets

# Our name of a split -> the hub's usual name.
SPLITS = {"train": "train", "valid": "validation", "test": "test"}
# OWNER/NAME, then @REVISION, :SUBSET (with a split, maybe an empty one) and :SPLIT.
HUB_ID = re.compile(
    r"(?P<name>[\w-]+/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?"
    r"(:(?P<subset>[\w.-]+)(?=:))?(:(?P<split>[\w\[\]:%+-]*))?"
)
# Suffixes of files that people have, beside those that are read. A dot in a hub's name, as in
# OWNER/corpus-v1.5, begins none of them.
FILE_SUFFIXES = {
    *READERS,
    *OPENERS,
    *(".txt .text .md .log .dat .tab .xml .html .htm .yaml .yml .pdf .rtf .doc .docx .odt".split()),
    *(".xls .xlsm .xlsb .ods .zip .tar .tgz .7z .rar .zst .arrow .feather .orc .avro".split()),
    *(".pkl .pickle .npy .npz .h5 .hdf5 .db .sqlite .sqlite3 .sav .dta .rds .sas7bdat".split()),
    *(".hl7 .eml .msg .wav .mp3 .m4a .mp4 .bak .tmp .old".split()),
}
KINDS = f"{', '.join(READERS)}, each also with {', '.join(OPENERS)}"


TEXT_FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")


class Location(NamedTuple):
    """Where the rows of a source are."""

    path: Path | None  # of a file or folder; None where the hub has it
    name: str  # the hub's id
    revision: str | None
    subset: str | None
    split: str  # the split's name at the source


def columns_of(data: DataConfig) -> dict[str, list[str]]:
    """data.columns with a list of names for every kind, and "id" where it names none."""
    columns = {"id": "id"} | data.columns
    return {kind: [names] if isinstance(names, str) else names for kind, names in columns.items()}


def sources_of(data: DataConfig, split: str) -> list[str]:
    """The sources that the configuration names for a split ("train", "valid", "test")."""
    sources = getattr(data, split)
    if sources is None:
        return []
    return [sources] if isinstance(sources, str) else sources


def expand(source: str, split: str) -> list[str]:
    """The files and folders that a pattern (`visits/*.csv`) means, sorted; else [source].

    Raises ConfigError where the pattern means none.
    """
    source = _without_tilde(source)
    if not re.search(r"[*?[]", source) or _exists(Path(source)):
        return [source]
    found = sorted(glob.glob(source, recursive=True)) or sorted(
        glob.glob(str(ROOT / source), recursive=True)
    )
    if not found and re.search(r"[*?]", source):
        raise ConfigError(f"data.{split}={source}: no file matches this pattern")
    # Excel keeps a file ~$NAME beside each workbook that is open.
    found = [name for name in found if not Path(name).name.startswith("~$")]
    return found or [source]  # brackets are also a part of the hub's splits, train[:10%]


def _without_tilde(source: str) -> str:
    """The source with the home folder for a leading ~, as a shell has it in other places."""
    return str(Path.home()) + source[1:] if source.startswith("~/") else source


def hub_id(source: str) -> re.Match | None:
    """The parts of a hub's id; None for what may be a path.

    A path is all that exists, has a file's suffix, more than one slash or none, or whose folder
    exists.
    """
    match = HUB_ID.fullmatch(source)
    if not match or Path(match["name"]).parent.is_dir():
        return None
    if any(Path(part).suffix.lower() in FILE_SUFFIXES for part in re.split("[@:]", source)):
        return None
    return match


def _exists(path: Path) -> bool:
    """Whether there is something. Raises ConfigError where this user may not know."""
    try:
        return path.exists()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def locate(source: str, split: str) -> Location:
    """Where the rows of a source are.

    Raises ConfigError for a path that is missing, and for a file of a kind that is not read.
    """
    default = SPLITS[split]
    source = _without_tilde(source)
    parts = source.split(":")
    for count in range(len(parts), 0, -1):  # the longest name that exists
        name, rest = ":".join(parts[:count]), parts[count:]
        for path in (Path(name), ROOT / name):  # what the repository ships is found from anywhere
            if name and len(rest) <= 2 and _exists(path):
                if path.is_file() and format_of(path) not in READERS:
                    raise ConfigError(
                        f"data.{split}={source}: the kinds of files that are read: {KINDS}"
                    )
                if not (path.is_file() or path.is_dir()):
                    raise ConfigError(
                        f"data.{split}={source}: is a pipe or a device; copy its rows into a file"
                    )
                subset = rest[0] if len(rest) == 2 else None
                return Location(path, name, None, subset, (rest[-1] if rest else "") or default)
    match = hub_id(source)
    if "://" in source:
        raise ConfigError(
            f"data.{split}={source}: is an address, and only files of this machine and the hub's "
            "OWNER/NAME are read: copy the file here and name its path"
        )
    if match is None:
        raise ConfigError(
            f"data.{split}={source}: no such file or folder (not asked of the hub, whose ids are "
            "OWNER/NAME without a file's suffix)"
        )
    return Location(
        None, match["name"], match["revision"], match["subset"], match["split"] or default
    )


@functools.lru_cache(maxsize=4)
def _load_dataset(at: Location) -> "datasets.Dataset | list[dict | BadRow]":
    """A split from the hub, from a folder in its layout, or from one of save_to_disk.

    Of a folder of CSV or JSON files its rows, as this package reads such files: the library would
    read the id 007 as the number 7.
    """
    import datasets

    if at.path is None:
        return datasets.load_dataset(
            at.name, at.subset, split=at.split, revision=at.revision or "main"
        )
    if (at.path / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(at.path))
        if at.split not in saved:
            raise ConfigError(f"has the splits {', '.join(saved)}: name one, SOURCE:SPLIT")
        return saved[at.split]
    if (at.path / "state.json").is_file():
        return datasets.load_from_disk(str(at.path))
    if any(at.path.glob("*/state.json")) or any(at.path.glob("*/dataset_dict.json")):
        raise ConfigError("its folders are of save_to_disk: name one of them")
    if not any(format_of(path) not in (".txt", ".md", "") for path in at.path.rglob("*.*")):
        raise ConfigError(_describe(at.path))  # the library would read each line as a row
    _check_one_kind(at.path)
    # The library's cache would keep a copy of patients' dialogues in the home folder. A temporary
    # one is removed with this block.
    with tempfile.TemporaryDirectory() as cache:
        builder = datasets.load_dataset_builder(str(at.path), at.subset, cache_dir=cache)
        if files := _text_files(builder, at.split):
            return [row for file in files for _, row in READERS[format_of(file)](file)]
        return datasets.load_dataset(
            str(at.path), at.subset, split=at.split, cache_dir=cache, keep_in_memory=True
        )


def _text_files(builder: Any, split: str) -> list[Path]:
    """The files of a folder's split; [] where the library must read them.

    That is: they are in no text format, or the folder's README.md says how they are to be read.
    """
    files = [Path(file) for file in (builder.config.data_files or {}).get(split, ())]
    plain = type(builder.config)()
    where = {"name", "version", "data_dir", "data_files", "description"}
    options = [field.name for field in dataclasses.fields(plain) if field.name not in where]
    if any(getattr(builder.config, name) != getattr(plain, name) for name in options):
        return []
    readable = all(file.is_file() and format_of(file) in TEXT_FORMATS for file in files)
    return files if readable else []


def open_dataset(source: str, split: str) -> "datasets.Dataset | list[dict | BadRow]":
    """The rows of a source that is a data set: of the hub, or a folder.

    Raises ConfigError naming the source.
    """
    at = locate(source, split)
    if at.path:
        check_data_folder(f"data.{split}={source}", at.path)
    try:
        return _load_dataset(at)
    except Exception as error:  # each of the library's readers raises its own exceptions
        root = _root_cause(error)  # says what is wrong, and where
        if isinstance(root, ConfigError):
            problem = str(root)
        elif at.path:
            problem = _parts_of(root) or f"{_describe(at.path)} ({type(root).__name__})"
        else:
            # A parser's message could quote the data; the file system's and the hub's do not.
            reason = ""
            if isinstance(root, (OSError, LookupError, ValueError)) and str(root):
                reason = f": {str(root).splitlines()[0][:160]}"
            problem = (
                "no such file or folder, and the hub has no answer; point it at a local file or "
                f"folder ({type(root).__name__}{reason})"
            )
        raise ConfigError(f"data.{split}={source}: {problem}") from root


def _check_one_kind(folder: Path) -> None:
    """Raises ConfigError for files of several kinds: the library would read one kind alone.

    A README.md that names the files says what counts.
    """
    kinds = {
        format_of(path)
        for path in folder.rglob("*")
        if not path.name.startswith((".", "dataset_info", "dataset_dict"))
    } & {*READERS}
    card = folder / "README.md"
    named = card.is_file() and "data_files" in card.read_text("utf-8", errors="replace")
    if len(kinds) > 1 and not named:
        raise ConfigError(
            f"a folder of {', '.join(sorted(kinds))} files, of which one kind alone would be read: "
            f"name the files, or a pattern such as {folder.name}/*{min(kinds)}"
        )


def _parts_of(error: BaseException) -> str:
    """What splits or subsets a folder has, where the library misses the one that is wanted."""
    found = re.search(
        r"(Unknown split|available configs).*?(\[[^\[\]]{1,300}\])", str(error), re.DOTALL
    )
    if not found:
        return ""
    what, how = "splits", "SOURCE:SPLIT"
    if found[1] != "Unknown split":
        what, how = "subsets", "SOURCE:SUBSET:SPLIT"
    names = ", ".join(re.findall(r"[\w.-]+", found[2]))
    return f"has the {what} {names}: name one, {how}"


def _describe(folder: Path) -> str:
    """What a folder holds and what it should hold; no file's name, which may be a patient's."""
    kinds = collections.Counter(
        path.suffix.lower() or "no suffix" for path in folder.rglob("*") if path.is_file()
    )
    found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4)) or "nothing"
    return (
        f"a folder that holds {found}; expected NAME.dialogue.txt with NAME.note.txt, a folder "
        "in the hub's layout or of save_to_disk; for single files name them, or a pattern "
        f"such as {folder.name}/*.csv"
    )


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def read_rows(source: str, split: str, data: DataConfig) -> tuple[Rows, str]:
    """(the numbered rows of a source, the split's name at the source).

    Raises ConfigError naming the source when there is none, or none that fits data.columns.
    """
    at = locate(source, split)
    if at.path and at.path.is_file():
        return READERS[format_of(at.path)](at.path), at.split
    if at.path and any(any(at.path.rglob(f"*.{k}.txt")) for k in ("dialogue", "note")):
        if not {"dialogue", "note"} & set(data.columns):
            raise ConfigError(
                f"data.{split}={source}: a folder of dialogues and notes has no messages; "
                "map dialogue and note in data.columns"
            )
        return read_text_pairs(at.path, columns_of(data)), at.split
    return enumerate(open_dataset(source, split), 1), at.split


def digest_sources(config: Config) -> bytes:
    """SHA-256 of every byte that the examples of any split are made from.

    Of sources on the hub, the library's own fingerprint counts. Raises OSError for a file that
    can't be read, ConfigError for a source that is missing.
    """
    digest = hashlib.sha256()
    for split in SPLITS:
        for source in sources_of(config.data, split):
            for name in expand(source, split):
                path = locate(name, split).path
                if path is None:
                    found: Any = open_dataset(name, split)  # of the hub, so the library's
                    digest.update(found._fingerprint.encode())
                    continue
                files = [path]
                if path.is_dir():
                    files = sorted(p for p in path.rglob("*") if p.is_file())
                for file in files:
                    digest.update(f"{source} {file.name} {file.stat().st_size}\n".encode())
                    with file.open("rb") as content:
                        while block := content.read(1 << 22):
                            digest.update(block)
    return digest.digest()
