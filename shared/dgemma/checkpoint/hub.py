"""From a hub id to a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dgemma.checkpoint.faults import HF_QUANT_CONFIG
from dgemma.errors import CheckpointError

# The files of a model. A repository may hold other formats and demos beside them.
HUB_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    HF_QUANT_CONFIG,
]

# The files that a conversion copies, too.
EVERY_FILE = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md"]
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"({_PART}/{_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]*))?")


def resolve(model: str | Path, progress: bool = True, files: Sequence[str] = HUB_FILES) -> Path:
    """The folder of a checkpoint: `model` itself, or a hub id `org/name[@revision]`, downloaded or cached.

    A download fetches only `files` (patterns). The hub's own progress bars go to stderr unless `progress`
    is False. HF_HUB_OFFLINE, HF_HOME and HF_TOKEN mean what they always do. The cached copy serves if there
    is no network. CheckpointError if there is no such folder or the hub does not hand the model out.
    """
    if not (name := str(model)):
        raise CheckpointError("an empty model name; give a folder or a hub id org/name")
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):
        return folder
    if os.path.exists(folder):
        raise CheckpointError(f"{name!r} is not a folder; give the folder of the checkpoint")
    # A hub id has one slash; its revision may have more ("refs/pr/1").
    if isinstance(model, Path) or name[0] in "./~" or "\\" in name or name.split("@")[0].count("/") > 1:
        raise CheckpointError(f"{name!r}: no such folder")
    match = _HUB_ID.fullmatch(name)
    # The hub allows neither: its cache writes "/" as "--".
    if match is None or ".." in name or "--" in match[1]:
        raise CheckpointError(f"{name!r} is neither a folder nor a hub id org/name[@revision]")
    return _download(match[1], match[2], progress, files)


def _download(repo: str, revision: str | None, progress: bool, files: Sequence[str]) -> Path:
    # Imported late: a folder needs no client of the hub.
    import huggingface_hub as hub
    from huggingface_hub import errors

    # The order matters: GatedRepoError is a RepositoryNotFoundError.
    advice: dict[type[Exception], str] = {
        errors.GatedRepoError: f"access is gated: accept the terms at https://huggingface.co/{repo}, "
        "then run `hf auth login` or set HF_TOKEN",
        errors.RepositoryNotFoundError: "neither a folder here nor a model that the hub shows you; "
        "for a private one run `hf auth login` or set HF_TOKEN",
        errors.RevisionNotFoundError: f"the hub has no revision {revision!r} of it",
        errors.LocalEntryNotFoundError: "not wholly in the cache, and the hub cannot be reached or "
        "HF_HUB_OFFLINE is set; connect, or give a folder",
    }
    # Errors of the HTTP client pass through the hub unchanged. The client depends on the hub's release, so
    # its base class (and OSError) comes from the hub's own error. hf_xet raises RuntimeError.
    failures: tuple[type[Exception], ...] = (*errors.HfHubHTTPError.__bases__, ValueError, RuntimeError)
    try:
        with _bars(progress):
            return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=list(files)))
    except failures as error:
        reason = next((text for kind, text in advice.items() if isinstance(error, kind)), None)
        raise CheckpointError(f"{repo!r}: {reason or _failed(error)}") from None


def _failed(error: BaseException) -> str:
    """One line for an error without advice of its own."""
    text = " ".join(str(error).split())
    return f"download failed ({type(error).__name__}: {text[:200]}); try again: what has arrived is kept"


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Hides the hub's progress bars unless `shown`."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
