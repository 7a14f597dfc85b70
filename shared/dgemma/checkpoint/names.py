"""What a user may write for a model on the hub: an id, or a link copied from the hub's page."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dgemma.errors import CheckpointError
from dgemma.files import quoted

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"({_PART}/{_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]*))?")
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_TAKEN = "dgemma takes a folder, a hub id org/name[@revision], or a link to such a model on huggingface.co"
# Pages of the hub that begin like a model's.
_OTHERS = ("datasets", "spaces", "kernels", "buckets", "collections", "papers", "docs", "blog", "settings")
_OF_FILES = ("tree", "blob", "resolve", "raw", "blame", "commit", "commits")  # a revision follows
_REF = re.compile(r"refs/(?:pr|convert)/[^/]+")  # a revision of three parts


def hub_id(model: str | Path) -> tuple[str, str | None]:
    """The repository `org/name` that a name or a link means, and its revision if it has one.

    CheckpointError says what is taken if it is neither.
    """
    name = str(model)
    link = None if isinstance(model, Path) else _link(name)
    # A hub id has one slash; its revision may have more ("refs/pr/1").
    if link is None and (
        isinstance(model, Path) or name[0] in "./~" or "\\" in name or name.split("@")[0].count("/") > 1
    ):
        raise CheckpointError(f"{quoted(name)}: no such folder")
    text = link or name
    match = _HUB_ID.fullmatch(text)
    # The hub allows neither: its cache writes "/" as "--".
    if match is None or ".." in text or "--" in match[1]:
        raise CheckpointError(f"{quoted(name)} is neither a folder nor a hub id org/name[@revision]")
    return match[1], match[2]


def _link(name: str) -> str | None:
    """The id that a link holds; None for what is no link."""
    scheme, mark, rest = name.strip().partition("://")
    if not mark:  # a browser's address line leaves https:// out
        if not scheme.lower().startswith(tuple(f"{host}/" for host in _hosts())):
            return None
        scheme, rest = "https", scheme
    if scheme.lower() == "hf":
        parts = [part for part in rest.split("/") if part]
        return _model(name, parts[parts[:1] == ["models"] :], "hf")
    try:
        parsed = urlsplit(f"https://{rest}")
        host = parsed.hostname
    except ValueError:
        host = None
    if scheme.lower() not in ("http", "https") or host not in _hosts():
        raise CheckpointError(f"{quoted(name)}: {_TAKEN}")
    parts = [part for part in parsed.path.split("/") if part]
    for prefix in (["api", "models"], ["models"]):
        if parts[: len(prefix)] == prefix:
            parts = parts[len(prefix) :]
    return _model(name, parts, "https")


def _hosts() -> set[str]:
    """The hub's hosts: its own, and that of another one if HF_ENDPOINT names it."""
    try:
        own = urlsplit(os.environ.get("HF_ENDPOINT", "")).hostname
    except ValueError:
        own = None
    return {*_HOSTS, *([own] if own else [])}


def _model(name: str, parts: list[str], scheme: str) -> str:
    """The id of a link's path: org, name, and on the hub's pages the kind of page, a revision and a file."""
    if parts[:1] and parts[0] in _OTHERS:
        raise CheckpointError(f"{quoted(name)}: a page of the hub's {parts[0]}, not of a model; {_TAKEN}")
    if len(parts) < 2:
        raise CheckpointError(f"{quoted(name)}: names no model; {_TAKEN}")
    org, (repo, _, revision), rest = parts[0], parts[1].partition("@"), parts[2:]
    repo = repo.removesuffix(".git")
    if scheme == "https" and rest:
        if rest[0] not in _OF_FILES:
            raise CheckpointError(f"{quoted(name)}: not a page of a model's files; give {org}/{repo}")
        revision, rest = _revision(rest[1:])
        if parts[2] in ("commit", "commits"):
            rest = []
        # tree names a folder, the others a file.
        rest = rest if parts[2] == "tree" else rest[:-1]
    elif revision and _REF.fullmatch("/".join([revision, *rest[:2]])):
        revision, rest = "/".join([revision, *rest[:2]]), rest[2:]
    if len(rest) > (scheme == "hf"):  # hf:// may name a file
        raise CheckpointError(
            f"{quoted(name)}: dgemma takes whole models, not a folder of one; give {org}/{repo}"
        )
    return f"{org}/{repo}" + (f"@{unquote(revision)}" if revision else "")


def _revision(parts: list[str]) -> tuple[str, list[str]]:
    """The revision that begins these parts of a page's path, and what follows it."""
    if _REF.fullmatch("/".join(parts[:3])):
        return "/".join(parts[:3]), parts[3:]
    return (parts[0] if parts else ""), parts[1:]
