"""Files of the hub, through its own client and into its own cache."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from fnmatch import fnmatchcase
from pathlib import Path
from time import sleep
from typing import Any

from dgemma.network.ops import Notices

TRIES = 6
MOST_WAIT = 150.0  # seconds in all; the hub counts requests in windows of five minutes
_BUSY = (408, 429, 500, 502, 503, 504)


class Failure(Exception):
    """Why the hub gave nothing: one line. `offline`: it was not asked, or could not be reached."""

    def __init__(self, text: str, cause: BaseException, offline: bool = False):
        super().__init__(text)
        self.cause, self.offline = cause, offline


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a file of a repository fits a pattern. A `*` stands for no slash: `*.json` lies at the top."""
    parts = name.split("/")
    return any(
        len(parts) == pattern.count("/") + 1 and all(map(fnmatchcase, parts, pattern.split("/")))
        for pattern in patterns
    )


def cached(repo: str, revision: str | None) -> Path | None:
    """The folder of a revision in the cache, complete or not; None if there is none."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:  # no pattern: the hub's own check of completeness knows only what it once listed
        return Path(hub.snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[]))
    except (errors.LocalEntryNotFoundError, OSError, ValueError):
        return None


def listing(repo: str, revision: str | None) -> list[str]:
    """The files of a revision on the hub; Failure if it does not say."""
    import huggingface_hub as hub

    with _failures(repo, revision):
        try:
            info = hub.HfApi().model_info(repo, revision=revision, timeout=hub.constants.HF_HUB_ETAG_TIMEOUT)
            return [file.rfilename for file in info.siblings or () if isinstance(file.rfilename, str)]
        except (KeyError, TypeError, AttributeError) as error:  # JSON, but of another service
            raise Failure("what answers is not the hub; see HF_ENDPOINT and the proxy", error) from None


def fetch(repo: str, revision: str | None, names: Sequence[str], progress: bool) -> Path:
    """The folder of a revision in the cache with these files, of which those that lack are downloaded.

    One after the other and in this thread, so that Ctrl-C ends it at once: the threads of the hub's own
    `snapshot_download` finish their files first. Big files come in parallel parts anyway. Failure if the
    hub does not give them.
    """
    import huggingface_hub as hub

    folder = None
    with _failures(repo, revision), _bars(progress):
        for name in sorted(names, key=lambda name: (name.endswith(".safetensors"), name)):
            # The first file writes down which commit the revision is; all others are of this commit.
            commit = folder.name if folder else revision
            if folder is None or not os.path.exists(folder / name):
                # The client would wait without an end if a busy hub asks for it; this only asks.
                url = hub.hf_hub_url(repo, name, revision=commit)
                hub.get_hf_file_metadata(url, timeout=hub.constants.HF_HUB_ETAG_TIMEOUT)
            path = Path(hub.hf_hub_download(repo, name, revision=commit))
            folder = folder or path.parents[name.count("/")]
    assert folder is not None
    return folder


def patiently(repo: str, notices: Notices, attempt: Any) -> Any:
    """What `attempt()` returns, tried again while the hub is busy, after the time that it asks for.

    Failure after TRIES, or if the waiting would take longer than MOST_WAIT in all.
    """
    waited = 0.0
    for count in range(TRIES):
        try:
            return attempt()
        except Failure as failure:
            status = _status(failure.cause)
            if status not in _BUSY or count == TRIES - 1:
                raise
            pause = asked_pause(failure.cause.response.headers)  # type: ignore[attr-defined]
            pause = 2.0**count if pause is None else pause
            if waited + pause > MOST_WAIT:
                raise
            notices.say(f"{repo!r}: the hub is busy ({status}); trying again in {pause:.0f} s")
            sleep(pause)
            waited += pause
    raise AssertionError


def asked_pause(headers: Any) -> float | None:
    """Seconds that an answer of the hub asks to wait; None if it does not say."""
    text = headers.get("retry-after", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        date = None
    if date is not None:
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        return max(0.0, (date - datetime.now(UTC)).total_seconds())
    window = dict(part.strip().partition("=")[::2] for part in headers.get("ratelimit", "").split(";"))
    return float(window["t"]) if window.get("r") == "0" and window.get("t", "").isdecimal() else None


def _status(error: BaseException | None) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


@contextmanager
def _failures(repo: str, revision: str | None) -> Iterator[None]:
    """Turns what the hub's client raises into Failure."""
    from huggingface_hub import errors

    # Errors of the HTTP client pass through the hub unchanged. The client depends on the hub's release, so
    # its base class (and OSError) comes from the hub's own error. hf_xet raises RuntimeError.
    kinds: tuple[type[Exception], ...] = (*errors.HfHubHTTPError.__bases__, ValueError, RuntimeError)
    try:
        yield
    except kinds as error:
        # The hub wraps what went wrong where it then found nothing in its cache either.
        wrapped = isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception)
        cause = error.__cause__ if wrapped else error
        assert cause is not None
        raise _explained(repo, revision, cause) from None


def _explained(repo: str, revision: str | None, error: BaseException) -> Failure:
    from huggingface_hub import errors

    # The order matters: GatedRepoError is a RepositoryNotFoundError.
    advice: dict[type[Exception], str] = {
        errors.GatedRepoError: f"access is gated: accept the terms at https://huggingface.co/{repo}, "
        "then run `hf auth login` or set HF_TOKEN",
        errors.DisabledRepoError: "the hub has disabled access to it",
        errors.RepositoryNotFoundError: "neither a folder here nor a model that the hub shows you; "
        "for a private one run `hf auth login` or set HF_TOKEN",
        errors.RevisionNotFoundError: f"the hub has no revision {revision!r} of it",
        errors.EntryNotFoundError: f"the hub lacks a file that it listed ({_short(error)}); try again",
    }
    statuses = {
        401: "the hub does not accept your token (401); run `hf auth login` again or correct HF_TOKEN",
        403: "the hub forbids it (403); your token may lack the permission",
        404: "the hub has no such model (404); see HF_ENDPOINT",
        416: "the hub cannot go on after the part that has arrived (416); delete the *.incomplete files "
        f"under models--{repo.replace('/', '--')} in its cache and try again",
        429: "the hub takes no more requests now (429)",
    }
    if isinstance(error, errors.OfflineModeIsEnabled):
        return Failure("HF_HUB_OFFLINE is set", error, offline=True)
    status = _status(error)
    text = next((text for kind, text in advice.items() if isinstance(error, kind)), None)
    if text is None and status is not None:
        text = statuses.get(status)
        if text is None and status >= 500:
            text = f"the hub is out of order ({status})"
        elif text is None:
            text = f"the hub refuses ({status}: {_short(error)})"
        if status in _BUSY:
            pause = asked_pause(error.response.headers)  # type: ignore[attr-defined]
            text += f"; try again in {pause:.0f} s" if pause else "; try again later"
    if text is None and _is_transport(error):
        return Failure(f"the hub cannot be reached ({_short(error)}), try again", error, offline=True)
    if text is None and isinstance(error, OSError) and error.errno is not None:  # of the disk
        text = f"the cache cannot be written ({error.strerror}); make room there, or name another in HF_HOME"
    if text is None:
        text = f"download failed ({_short(error)}); try again: whole files that have arrived are kept"
    return Failure(text, error)


def _is_transport(error: BaseException) -> bool:
    """Whether the connection failed, rather than the hub or the disk."""
    return any(
        kind.__name__ in ("TransportError", "ConnectionError", "LocalEntryNotFoundError")
        for kind in type(error).__mro__
    )


def _short(error: BaseException) -> str:
    """An error of another library on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


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
