"""An adapter, a model or a GGUF file goes to the hub, with its card. Only when it is asked for.

A repository is private unless `public` says otherwise. Weights can remember single patients, so
one that is public already is not written to without that word.
"""

import json
from pathlib import Path
from typing import NamedTuple

from httpx import HTTPError
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..config.error_text import first_line
from ..config.schema import ConfigError
from .card import CARD, TRAINED, base_name

# What belongs to a model. Anything else in the folder stays here.
PATTERNS = (
    *("*.safetensors", "*.gguf", "*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt"),
    *(CARD, "LICENSE*", "NOTICE*", "Modelfile"),
)
# Where a folder of this machine may stand: its path is nobody's business.
NAMES_OF_THE_BASE = {TRAINED: "base", "adapter_config.json": "base_model_name_or_path"}


class Upload(NamedTuple):
    """A file as it arrives in the repository."""

    name: str
    content: bytes | Path

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def push_to_hub(folder: Path, repo: str, public: bool = False) -> str:
    """Uploads a folder in one commit, and returns the repository's address.

    Args:
        folder: an adapter, a merged or full model, or what `export --gguf` wrote.
        repo: OWNER/NAME, which is made where it is not there.

    Raises ConfigError for a folder that is none of these, a repository that is public without
    `public`, and where the hub refuses or can't be reached.
    """
    uploads = files_to_push(folder, repo)
    api = HfApi()
    try:
        url = api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.repo_info(repo).private:
            raise ConfigError(
                f"--push {repo}: is there and is public; add --public, or name another"
            )
        operations = [CommitOperationAdd(u.name, u.content) for u in uploads]
        api.create_commit(repo, operations, commit_message=f"Upload {folder.name}")
    except LocalTokenNotFoundError as error:
        raise ConfigError(f"--push {repo}: {first_line(error)}; run: hf auth login") from error
    except (HTTPError, OSError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"--push {repo}: the hub refused, or was not reached: {reason}"
        ) from error
    return str(url)


def files_to_push(folder: Path, repo: str) -> list[Upload]:
    """What `push_to_hub` would upload. It needs no network. Raises ConfigError."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push {repo}: is not OWNER/NAME: {first_line(error)}") from error
    if "/" not in repo:
        raise ConfigError(f"--push {repo}: is not OWNER/NAME")
    if not (folder / TRAINED).is_file() or not (folder / CARD).is_file():
        raise ConfigError(
            f"--push: {folder} has no {TRAINED} and {CARD}, so it is not what a run, merge or "
            "export wrote; name a folder such as runs/NAME/adapter"
        )
    paths = {path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return [Upload(path.name, without_local_paths(path)) for path in sorted(paths)]


def without_local_paths(path: Path) -> bytes | Path:
    """The file, or its content where the base that it names is a folder of this machine."""
    key = NAMES_OF_THE_BASE.get(path.name)
    if key is None:
        return path
    content = json.loads(path.read_text())
    base = content.get(key) or ""
    if base_name(base) == base:
        return path
    return json.dumps(content | {key: base_name(base)}, indent=1).encode()
