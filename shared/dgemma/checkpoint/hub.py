"""From what a user calls a model to its folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from dgemma.checkpoint import download
from dgemma.checkpoint.download import matches
from dgemma.checkpoint.faults import HF_QUANT_CONFIG
from dgemma.checkpoint.folder import SINGLE, shards
from dgemma.checkpoint.hints import foreign_names, misplaced
from dgemma.checkpoint.names import hub_id
from dgemma.checkpoint.safetensors import TruncatedError, read_header
from dgemma.errors import CheckpointError, ConfigError
from dgemma.files import names, quoted, reason
from dgemma.network.ops import Notices

# The files of a model but its weights. A repository may hold other formats and demos beside and below them.
SMALL_FILES = [
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    HF_QUANT_CONFIG,
]
HUB_FILES = ["*.safetensors", *SMALL_FILES]

# The files that a conversion copies, too.
EVERY_FILE = [
    *("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md"),
    "additional_chat_templates/*.jinja",
]

_NEEDED = ("config.json", "tokenizer.json")


def resolve(
    model: str | Path,
    progress: bool = True,
    files: Sequence[str] = HUB_FILES,
    notices: Notices | None = None,
) -> Path:
    """The folder of a checkpoint: `model` itself, or a hub id `org/name[@revision]`, downloaded or cached.

    A link to a model's page on the hub is as good as its id. A download fetches only `files`: patterns, whose
    `*` ends at a slash. Small files come first: `resolve(model, files=SMALL_FILES)` and then `resolve(model)`
    let a caller look at them before gigabytes follow. The hub's own progress bars go to stderr unless
    `progress` is False. HF_HUB_OFFLINE, HF_HOME and HF_TOKEN mean what they always do. A busy hub is asked
    again for a while, which `notices` (default: the logger "dgemma") are told. A whole copy in the cache
    serves if the hub gives none. CheckpointError if there is no such folder, if it is none of a checkpoint,
    or if the hub does not hand the model out.
    """
    if not (name := str(model)):
        raise CheckpointError("an empty model name; give a folder or a hub id org/name")
    if (folder := _local(name)) is not None:
        return folder
    repo, revision = hub_id(model)
    return _from_hub(repo, revision, progress, files, notices or Notices())


def _local(name: str) -> Path | None:
    """The folder of this name; None if nothing here has it."""
    path = Path(os.path.expanduser(name))
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            if hint := misplaced(path):
                raise CheckpointError(f"{quoted(name)}: {hint}")
            return path
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            raise CheckpointError(
                f"{quoted(name)}: a link to {os.readlink(path)}, which is not there"
            ) from None
        return None
    except (OSError, ValueError) as error:  # ValueError: a name that no file system takes
        raise CheckpointError(f"{quoted(name)}: cannot be read ({reason(error)})") from None
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if hint := foreign_names([path.name]):
        raise CheckpointError(f"{quoted(name)}: {hint}")
    if stat.S_ISREG(mode) and path.suffix in (".safetensors", ".json", ".jinja"):
        raise CheckpointError(f"{quoted(name)} is not a folder but a file; give its folder {path.parent}")
    raise CheckpointError(f"{quoted(name)} is not a folder; give the folder of the checkpoint")


def _from_hub(
    repo: str, revision: str | None, progress: bool, files: Sequence[str], notices: Notices
) -> Path:
    def attempt() -> Path:
        try:
            listed = download.listing(repo, revision)
        except download.Failure as failure:
            folder = download.cached(repo, revision)
            if folder is None or _missing(folder, files):
                raise
            if not failure.offline:
                notices.say(f"{repo!r}: {failure}; the copy in the cache serves")
            return folder
        _check_listing(repo, listed, files)
        return download.fetch(repo, revision, [name for name in listed if matches(name, files)], progress)

    try:
        folder = download.patiently(repo, notices, attempt)
        _check_copy(repo, folder, files)
    except download.Failure as failure:
        raise CheckpointError(f"{repo!r}: {_without(repo, revision, files, failure)}") from None
    except ConfigError as error:
        raise CheckpointError(f"{repo!r}: its copy in the cache: {error}") from None
    return folder


def _without(repo: str, revision: str | None, files: Sequence[str], failure: download.Failure) -> str:
    """What to say where the hub gave nothing."""
    folder = download.cached(repo, revision)
    if folder is not None and (lacks := _missing(folder, files)):
        more = f" and {len(lacks) - 1} more" if len(lacks) > 1 else ""
        again = "run this again online to complete the download"
        return f"the copy in the cache is a part of it and lacks {lacks[0]}{more}; {failure}; {again}"
    if failure.offline:
        return f"not wholly in the cache, and {failure}; connect to download it, or give a folder"
    return str(failure)


def _check_listing(repo: str, listed: Sequence[str], files: Sequence[str]) -> None:
    """CheckpointError if the hub's repository is none of a checkpoint of ours; nothing is downloaded then."""
    weights = any(matches(name, ["*.safetensors"]) for name in listed)
    lacks = None
    if "config.json" not in listed:
        lacks = "config.json"
    elif matches(SINGLE, files) and not weights:
        lacks = ".safetensors file"
    if lacks:
        hint = foreign_names(listed)
        raise CheckpointError(f"{repo!r}: no {lacks} among the hub's files" + (f": {hint}" if hint else ""))


def _missing(folder: Path, files: Sequence[str]) -> list[str]:
    """The files that a copy in the cache lacks, as far as it shows: the hub's list is not at hand."""
    held = names(folder)
    there = [name for name in held if matches(name, files)]
    # Weights come last, so a copy with weights has all that the hub has beside them.
    bare = not any(name.endswith(".safetensors") for name in held)
    lacks = [name for name in _NEEDED if bare and name in files and name not in held]
    # A link without its blob: pruned, or not yet downloaded.
    lacks += sorted(name for name in there if not os.path.exists(folder / name))
    if not lacks and matches(SINGLE, files):
        try:
            lacks = [file.name for file in shards(folder) or [folder / SINGLE] if not os.path.exists(file)]
        except CheckpointError:  # an unusable index: whoever reads it says so
            return []
    return lacks


def _check_copy(repo: str, folder: Path, files: Sequence[str]) -> None:
    """CheckpointError if a file of the cache is cut, which the hub's client does not see."""
    for name in names(folder):
        file = folder / name
        if not matches(name, files) or not os.path.isfile(file):
            continue
        if name.endswith(".json") and not _closed(file):
            raise _damaged(repo, file, f"{file}: truncated")
        if name.endswith(".safetensors"):
            try:
                read_header(file)
            except TruncatedError as error:
                raise _damaged(repo, file, str(error)) from None
            except CheckpointError:  # as it is on the hub: whoever opens the checkpoint says so
                pass


def _closed(file: Path) -> bool:
    """Whether the text of a JSON file comes to an end."""
    try:
        with file.open("rb") as stream:
            stream.seek(-min(64, os.path.getsize(file)), os.SEEK_END)
            return stream.read().rstrip().endswith((b"}", b"]"))
    except OSError:  # whoever reads it says so
        return True


def _damaged(repo: str, file: Path, fault: str) -> CheckpointError:
    blob = os.path.realpath(file)
    return CheckpointError(
        f"{repo!r}: its copy in the cache is damaged: {fault}; delete {blob} and run this online"
    )
