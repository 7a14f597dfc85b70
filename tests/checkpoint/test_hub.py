"""`resolve` and the hub: the hub's own client against a hub on this machine."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from dgemma.checkpoint import download
from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.checkpoint.folder import INDEX
from dgemma.checkpoint.hub import EVERY_FILE, HUB_FILES, SMALL_FILES, resolve
from dgemma.network.ops import Notices
from tests.checkpoint.fake_hub import COMMIT, FakeHub, serving
from tests.checkpoint.test_names import refused
from tests.checkpoints import make_checkpoint, minute

OTHERS = [
    "onnx/model.safetensors",
    "onnx/config.json",
    "original/consolidated.safetensors",
    "README.md",
    "a.gguf",
]


class Told(Notices):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def say(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a small repository."""
    folder = make_checkpoint(tmp_path_factory.mktemp("whole"), minute(), shards=2)
    names = [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "added_tokens.json",
        "processor_config.json",
    ]
    files = {name: f'["{name}"]'.encode() for name in names} | {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    return files | {"additional_chat_templates/rag.jinja": b"x"} | {name: b"x" for name in OTHERS}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(download, "sleep", lambda seconds: None)
    return tmp_path / "cache"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    with serving(FakeHub(dict(whole))) as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Cuts the network off."""
    return lambda: monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def snapshot(cache: Path) -> Path:
    return cache / "models--org--name" / "snapshots" / COMMIT


def held(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


# ---- what is fetched ------------------------------------------------------------------------------


def test_the_files_of_the_model_alone(hub: FakeHub, cache: Path) -> None:
    folder = resolve("org/name", progress=False)
    assert folder == snapshot(cache)
    assert held(folder) == set(hub.files) - set(OTHERS)
    Checkpoint.open(folder)


def test_small_files_come_first(hub: FakeHub, cache: Path) -> None:
    folder = resolve("org/name", progress=False, files=SMALL_FILES)
    assert INDEX in held(folder) and not any(name.endswith(".safetensors") for name in held(folder))
    hub.asked.clear()
    resolve("org/name", progress=False)
    assert [name[-11:] for name in hub.fetched] == ["safetensors"] * 2
    hub.asked.clear()
    assert resolve("org/name", progress=False) == folder
    assert not hub.fetched
    assert resolve(f"org/name@{COMMIT}", progress=False) == folder
    assert not hub.fetched


def test_weights_come_last(hub: FakeHub) -> None:
    resolve("https://huggingface.co/org/name", progress=False)
    weights = [name.endswith(".safetensors") for name in hub.fetched]
    assert weights == sorted(weights)


@pytest.mark.parametrize(
    ("name", "patterns", "good"),
    [
        ("model.safetensors", HUB_FILES, True),
        ("model-00001-of-00002.safetensors", HUB_FILES, True),
        ("onnx/model.safetensors", HUB_FILES, False),
        ("original/model.safetensors.index.json", HUB_FILES, False),
        ("sub/config.json", HUB_FILES, False),
        ("config.json", HUB_FILES, True),
        ("additional_chat_templates/tool_use.jinja", HUB_FILES, True),
        ("additional_chat_templates/a/b.jinja", HUB_FILES, False),
        ("chat_template.json", HUB_FILES, True),
        ("added_tokens.json", HUB_FILES, True),
        ("processor_config.json", HUB_FILES, True),
        ("preprocessor_config.json", HUB_FILES, True),
        ("README.md", HUB_FILES, False),
        ("model.gguf", HUB_FILES, False),
        ("model.safetensors", SMALL_FILES, False),
        ("README.md", EVERY_FILE, True),
        ("docs/README.md", EVERY_FILE, False),
        ("a.json", EVERY_FILE, True),
        ("onnx/a.json", EVERY_FILE, False),
    ],
)
def test_patterns_match_the_top_level(name: str, patterns: list[str], good: bool) -> None:
    assert download.matches(name, patterns) is good


def test_a_revision(hub: FakeHub, cache: Path, offline: Callable[[], None]) -> None:
    assert resolve("org/name@v1", progress=False) == snapshot(cache)
    refused(lambda: resolve("org/name@v2"), "'org/name'", "no revision 'v2'")
    offline()
    assert resolve("org/name@v1") == snapshot(cache)
    refused(lambda: resolve("org/name"), "not wholly in the cache")  # main was never asked for


def test_a_repository_of_something_else(hub: FakeHub, cache: Path) -> None:
    weights = [name for name in hub.files if name.endswith(".safetensors") and "/" not in name]
    for name in weights:
        del hub.files[name]
    refused(lambda: resolve("org/name"), "'org/name'", "no .safetensors", "a.gguf is GGUF")
    del hub.files["config.json"]
    refused(lambda: resolve("org/name"), "'org/name'", "no config.json", "a.gguf is GGUF")
    assert not hub.fetched


# ---- copies in the cache --------------------------------------------------------------------------


def test_offline(cache: Path, hub: FakeHub, offline: Callable[[], None]) -> None:
    offline()
    refused(lambda: resolve("org/name"), "'org/name'", "not wholly in the cache", "HF_HUB_OFFLINE")


def test_a_whole_copy_serves_offline(cache: Path, hub: FakeHub, offline: Callable[[], None]) -> None:
    resolve("org/name", progress=False)
    offline()
    told = Told()
    Checkpoint.open(resolve("org/name", notices=told))
    assert not told.texts


@pytest.mark.parametrize("files", [["config.json"], SMALL_FILES])
def test_a_part_of_a_model(hub: FakeHub, offline: Callable[[], None], files: list[str]) -> None:
    """`dgemma info` leaves config.json alone."""
    resolve("org/name", progress=False, files=files)
    hub.fail, hub.always = [("/", 503, {"Retry-After": "999"})], True
    refused(lambda: resolve("org/name"), "'org/name'", "the copy in the cache", "lacks", "out of order (503)")
    offline()
    message = refused(
        lambda: resolve("org/name"), "'org/name'", "the copy in the cache", "HF_HUB_OFFLINE", "download"
    )
    assert ("tokenizer.json" if files == ["config.json"] else "model-00001") in message
    assert resolve("org/name", files=files).name == COMMIT


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "config.json", "tokenizer.json", INDEX])
def test_a_pruned_file(hub: FakeHub, cache: Path, offline: Callable[[], None], name: str) -> None:
    """Its link is there and its data are gone: online it comes back."""
    folder = resolve("org/name", progress=False)
    (folder / name).resolve().unlink()
    hub.asked.clear()
    assert resolve("org/name", progress=False) == folder
    assert hub.fetched == [name]
    (folder / name).resolve().unlink()
    offline()
    refused(lambda: resolve("org/name"), "'org/name'", "the copy in the cache", f"lacks {name}", "download")


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "config.json", "tokenizer.json", INDEX])
@pytest.mark.parametrize("size", [0, 7, -3])
def test_a_cut_file(hub: FakeHub, cache: Path, name: str, size: int) -> None:
    folder = resolve("org/name", progress=False)
    blob = (folder / name).resolve()
    whole = blob.read_bytes()
    assert len(whole[:size]) < len(whole)
    blob.write_bytes(whole[:size])
    refused(lambda: resolve("org/name"), "'org/name'", "copy in the cache is damaged", f"delete {blob}")
    blob.unlink()
    assert resolve("org/name", progress=False) == folder


# ---- a hub that does not answer as wished ---------------------------------------------------------

REFUSALS: dict[str, tuple[int, dict[str, str], str]] = {
    "gated": (403, {"X-Error-Code": "GatedRepo"}, "accept the terms"),
    "gated, without a token": (401, {"X-Error-Code": "GatedRepo"}, "accept the terms"),
    "disabled": (403, {"X-Error-Message": "Access to this resource is disabled."}, "disabled"),
    "not found": (404, {"X-Error-Code": "RepoNotFound"}, "neither a folder here nor a model"),
    "revision": (404, {"X-Error-Code": "RevisionNotFound"}, "no revision"),
    "no reason": (404, {}, "(404)"),
    "token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "your token (401)"),
    "forbidden": (403, {}, "(403)"),
    "range": (416, {}, "*.incomplete"),
    "bad request": (400, {}, "refuses (400"),
    "teapot": (418, {}, "refuses (418"),
}


@pytest.mark.parametrize("case", list(REFUSALS))
def test_refusals(hub: FakeHub, case: str) -> None:
    status, headers, part = REFUSALS[case]
    hub.fail, hub.always = [("/api/models", status, headers)], True
    told = Told()
    message = refused(lambda: resolve("org/name", notices=told), "'org/name'", part)
    assert not told.texts and "reached" not in message
    assert len([path for path in hub.asked if "/api/models" in path]) == 1
    hub.fail = []
    resolve("org/name", progress=False)
    hub.fail = [("/api/models", status, headers)]
    assert resolve("org/name", notices=told).name == COMMIT  # the copy serves
    assert len(told.texts) == 1 and part in told.texts[0]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("where", ["/api/models", "config.json"])
def test_a_busy_hub_is_asked_again(hub: FakeHub, status: int, where: str) -> None:
    hub.fail = [(where, status, {"Retry-After": "3"})] * 2
    told = Told()
    Checkpoint.open(resolve("org/name", progress=False, notices=told))
    assert not hub.fail
    if where == "/api/models" or told.texts:  # of a file, some releases of the client ask again themselves
        assert told.texts == [f"'org/name': the hub is busy ({status}); trying again in 3 s"] * 2


def test_waiting_has_an_end(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(download, "sleep", waits.append)
    hub.fail, hub.always = [("/api/models", 503, {})], True
    refused(
        lambda: resolve("org/name", notices=Told()), "'org/name'", "out of order (503)", "try again later"
    )
    assert waits == [1, 2, 4, 8, 16]
    waits.clear()
    hub.fail = [("/api/models", 429, {"Retry-After": "70"})]
    refused(lambda: resolve("org/name", notices=Told()), "'org/name'", "(429)", "try again in 70 s")
    assert waits == [70, 70]
    waits.clear()
    hub.fail = [("/api/models", 429, {"Retry-After": "3600"})]
    refused(lambda: resolve("org/name", notices=Told()), "'org/name'", "(429)", "try again in 3600 s")
    assert not waits
    hub.fail = [("model-00002", 429, {"Retry-After": "3600"})]
    refused(
        lambda: resolve("org/name", progress=False, notices=Told()), "(429)", "try again in 3600 s", "lacks"
    )
    assert not waits


def test_the_pause_that_is_asked_for() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert 90 < (download.asked_pause({"retry-after": soon}) or 0) <= 100
    assert download.asked_pause({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert download.asked_pause({"retry-after": "12"}) == 12
    assert download.asked_pause({"ratelimit": '"api";r=0;t=55'}) == 55
    for headers in (
        {},
        {"retry-after": "soon"},
        {"retry-after": "-1"},
        {"ratelimit": '"api";r=3;t=55'},
        {"ratelimit": ";;="},
    ):
        assert download.asked_pause(headers) is None


def test_the_default_channel_is_a_logger(hub: FakeHub, caplog: pytest.LogCaptureFixture) -> None:
    hub.fail = [("/api/models", 503, {"Retry-After": "1"})]
    resolve("org/name", progress=False)
    assert [record.getMessage() for record in caplog.records if record.name == "dgemma"] == [
        "'org/name': the hub is busy (503); trying again in 1 s"
    ]


def test_no_connection(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for url, part in (
        ("http://127.0.0.1:9", "cannot be reached"),
        ("nonsense", "cannot be reached"),
        ("http://[", "'org/name'"),
    ):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        refused(lambda: resolve("org/name"), "'org/name'", part)


@pytest.mark.parametrize("data", [b"<html>", b"[]", b"{}", b"3", b'{"id": 3, "siblings": [{}]}'])
def test_something_else_answers(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(hub, "answer", lambda path: (200, {}, data))
    refused(lambda: resolve("org/name"), "'org/name'")


def test_a_file_that_goes_away(hub: FakeHub) -> None:
    hub.fail, hub.always = [("tokenizer.json", 404, {"X-Error-Code": "EntryNotFound"})], True
    refused(lambda: resolve("org/name", progress=False), "'org/name'", "lacks a file that it listed")


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (OSError(28, "No space left on device"), "No space left on device); make room"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (
            RuntimeError("Data processing error:\nCAS"),
            "CAS); try again: whole files that have arrived are kept",
        ),
        (ValueError("odd"), "odd"),
    ],
)
def test_failures_of_the_client(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, error: Exception, part: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    refused(lambda: resolve("org/name", progress=False), "'org/name'", part)


def test_progress_bars_can_be_switched_off(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import are_progress_bars_disabled  # type: ignore[attr-defined]

    seen = set()
    own = huggingface_hub.hf_hub_download

    def see(*args: Any, **kwargs: Any) -> Any:
        seen.add(are_progress_bars_disabled())
        return own(*args, **kwargs)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", see)
    before = are_progress_bars_disabled()
    resolve("org/name")
    assert seen == {before}
    seen.clear()
    resolve("org/name", progress=False)
    assert seen == {True}
    assert are_progress_bars_disabled() == before


# A shell that starts something in the background has it ignore Ctrl-C, and so all that it starts.
INTERRUPTED = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from dgemma.checkpoint.hub import resolve
try:
    resolve("org/name")
except KeyboardInterrupt:
    raise SystemExit(130)
"""


def test_ctrl_c_ends_a_download_at_once(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """The data of the weights come in never; a pool of threads would wait for them."""
    with serving(FakeHub(dict(whole), slow=threading.Event())) as hub:
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        env["HF_HUB_DOWNLOAD_TIMEOUT"] = "60"
        program = [sys.executable, "-c", INTERRUPTED]
        process = subprocess.Popen(program, env=env, stderr=subprocess.DEVNULL)
        try:
            while not any(name.endswith(".safetensors") for name in hub.fetched):
                assert process.poll() is None
                threading.Event().wait(0.05)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
        finally:
            process.kill()


def test_a_copy_of_a_model_that_has_no_tokenizer(hub: FakeHub, offline: Callable[[], None]) -> None:
    """Only a copy without weights lacks what the hub may have."""
    del hub.files["tokenizer.json"]
    folder = resolve("org/name", progress=False)
    offline()
    assert resolve("org/name") == folder


def test_a_cache_that_may_not_be_read(
    hub: FakeHub, offline: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resolve("org/name", progress=False)
    offline()
    own = os.listdir

    def fail(path: Any) -> list[str]:
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied")
        return own(path)

    monkeypatch.setattr("os.listdir", fail)
    refused(lambda: resolve("org/name"), "'org/name'", "cannot be read (Permission denied)")
