"""`dgemma.load`: its arguments, the order of its checks, and the memory that weights need."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import dgemma
from dgemma import loading, machine
from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.checkpoint.presets import PRESETS, preset_forms
from dgemma.cli import main
from dgemma.errors import BackendError, CheckpointError, ConfigError, DgemmaError
from dgemma.files import load_json
from dgemma.network.config import read_config
from dgemma.network.numpy_ops import NumpyOps
from dgemma.network.ops import Notices
from dgemma.network.passes import Backend, find
from dgemma.network.spec import text_parameters
from dgemma.released import RELEASED_DIR
from tests.checkpoints import make_checkpoint, small, write_json
from tests.cli.test_verify import make_quantized


class Said(Notices):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def say(self, text: str) -> None:
        self.texts.append(text)


def refused(kind: type[DgemmaError], *parts: str, **arguments: Any) -> None:
    with pytest.raises(kind) as caught:
        dgemma.load(**arguments)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


# ---- arguments ----------------------------------------------------------------------------------


class NoPath:
    def __fspath__(self) -> Any:
        return 5


@pytest.mark.parametrize("model", [5, b"folder", 1.5, ["a"], {}, object(), np.arange(300), NoPath()])
def test_a_model_that_is_no_name(model: Any) -> None:
    refused(CheckpointError, "folder or a hub id", model=model)


@pytest.mark.parametrize("model", ["", "no/such/folder/here", "a b", Path("org/name"), Path("nothing")])
def test_a_model_that_is_not_there(model: Any) -> None:
    refused(CheckpointError, model=model)


class Folder:
    """Any other path-like object."""

    def __init__(self, path: Path):
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.mark.parametrize("kind", [str, Path, Folder])
def test_a_folder_in_any_form(kind: Callable[[Path], Any], tmp_path: Path) -> None:
    model = dgemma.load(kind(make_checkpoint(tmp_path)), "numpy")
    assert model.ops.name == "numpy"


ARGUMENTS: list[tuple[dict[str, Any], type[DgemmaError], str]] = [
    ({"backend": None}, BackendError, "unknown backend None"),
    ({"backend": 3}, BackendError, "backend must be a name"),
    ({"backend": ["numpy"]}, BackendError, "backend must be a name"),
    ({"backend": "NumPy"}, BackendError, "unknown backend 'NumPy'"),
    ({"backend": "x" * 10_000}, BackendError, "unknown backend"),
    ({"backend": "a\nb"}, BackendError, "unknown backend"),
    ({"dtype": np.float32}, BackendError, "dtype must be a name, not type"),
    ({"dtype": np.dtype("float32")}, BackendError, "dtype must be a name, not Float32DType"),
    ({"dtype": "float16"}, BackendError, "unknown dtype 'float16'"),
    ({"dtype": 32}, BackendError, "dtype must be a name"),
    ({"dtype": ""}, BackendError, "unknown dtype ''"),
    ({"device": 0}, BackendError, "device must be a name"),
    ({"device": b"cpu"}, BackendError, "device must be a name"),
    ({"device": "cpu"}, BackendError, "not for numpy"),
    ({"activations": True}, BackendError, "activations must be a name"),
    ({"activations": "fp4"}, BackendError, "unknown activations"),
    ({"progress": 3}, ConfigError, "progress must be a function"),
    ({"progress": "bar"}, ConfigError, "progress must be a function"),
    ({"notices": print}, ConfigError, "notices must"),
    ({"notices": []}, ConfigError, "notices must"),
]


@pytest.mark.parametrize(("arguments", "kind", "text"), ARGUMENTS)
def test_arguments_of_a_wrong_type(arguments: dict[str, Any], kind: type[DgemmaError], text: str) -> None:
    refused(kind, text, **({"backend": "numpy"} | arguments))


def test_types_and_devices_of_pytorch() -> None:
    torch = pytest.importorskip("torch")
    refused(BackendError, "dtype must be a name", backend="cuda", dtype=torch.float32)
    refused(BackendError, "device must be a name", backend="cuda", device=torch.device("cpu"))


# ---- the order ----------------------------------------------------------------------------------

ORDER = """
import sys
import dgemma
try:
    dgemma.load(sys.argv[1], sys.argv[2])
except dgemma.DgemmaError as error:
    print(error)
print(sorted({"torch", "mlx", "huggingface_hub"} & set(sys.modules)))
"""


def process(*args: object) -> Sequence[str]:
    command = [sys.executable, "-c", ORDER, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("broken", ["config.json", "generation_config.json", "tokenizer.json", "weights"])
def test_files_are_checked_before_a_framework_is_imported(broken: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    folder = make_checkpoint(tmp_path, tokenizer=True)
    file = folder / ("model.safetensors" if broken == "weights" else broken)
    file.write_bytes(b"{")
    message, imported = process(folder, "cuda")
    assert file.name in message and imported == "[]"


class Hub:
    """A hub whose models are folders here; it keeps what was asked for."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.asked = folder, list[str]()
        monkeypatch.setattr(loading, "resolve", self.resolve)
        monkeypatch.setattr(loading, "make_ops", self.make_ops)

    def resolve(self, model: Any, files: Sequence[str] = ("*.safetensors",), notices: Any = None) -> Path:
        self.asked.append("weights" if "*.safetensors" in files else "small files")
        return self.folder

    def make_ops(self, *_: Any) -> NumpyOps:
        self.asked.append("framework")
        return NumpyOps(Said())


def test_small_files_then_the_framework_then_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(make_checkpoint(tmp_path), monkeypatch)
    dgemma.load("org/name", "numpy")
    assert hub.asked == ["small files", "framework", "weights"]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_no_weights_are_fetched_for_files_that_are_broken(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(make_checkpoint(tmp_path, tokenizer=True), monkeypatch)
    (tmp_path / name).write_text("{")
    refused(DgemmaError, name, model="org/name", backend="numpy")
    assert hub.asked == ["small files"]


def test_small_files_are_opened_again_where_a_branch_has_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(make_checkpoint(tmp_path / "old"), monkeypatch)
    new = make_checkpoint(tmp_path / "new", tokenizer=True)

    def moved(model: Any, files: Sequence[str] = ("*.safetensors",), notices: Any = None) -> Path:
        return new if hub.resolve(model, files) and "*.safetensors" in files else hub.folder

    monkeypatch.setattr(loading, "resolve", moved)
    assert dgemma.load("org/name", "numpy").tokenizer is not None


# ---- memory -------------------------------------------------------------------------------------


def machine_of(monkeypatch: pytest.MonkeyPatch, total: int | None, free: int | None = None) -> None:
    monkeypatch.setattr(machine, "total_memory", lambda: total)
    monkeypatch.setattr(machine, "free_memory", lambda: free)


def test_the_released_model_on_numpy_is_refused_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = Hub(RELEASED_DIR, monkeypatch)
    machine_of(monkeypatch, 64 * 10**9)
    parts = "org/name: ", "206.44 GB in float64", "64.00 GB", "--to mlx --preset quality makes", "--force"
    refused(BackendError, *parts, model="org/name", backend="numpy")
    assert hub.asked == ["small files"]


def test_a_folder_without_weights_needs_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_of(monkeypatch, 64 * 10**9)
    refused(BackendError, "206.44 GB", model=RELEASED_DIR, backend="numpy")
    machine_of(monkeypatch, 300 * 10**9)
    refused(CheckpointError, "safetensors", model=RELEASED_DIR, backend="numpy")


@pytest.mark.parametrize(
    ("backend", "dtype", "device", "platform", "held"),
    [
        ("numpy", None, None, "linux", "float64"),
        ("numpy", "bfloat16", None, "linux", "float64"),
        ("mlx", None, None, "darwin", "bfloat16"),
        ("mlx", "float32", None, "darwin", "float32"),
        ("mlx", None, None, "linux", None),
        ("cuda", None, "cpu", "linux", "float32"),
        ("cuda", "bfloat16", "cpu:0", "linux", "bfloat16"),
        ("cuda", None, None, "linux", None),
        ("cuda", None, "cuda:1", "linux", None),
    ],
)
def test_what_is_known_without_the_framework(
    backend: str,
    dtype: str | None,
    device: str | None,
    platform: str,
    held: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    found = loading._on_host(backend, dtype, device)
    assert (found and (found.name, found.dtype)) == (held and (backend, held))


def needed(folder: Path) -> int:
    checkpoint = Checkpoint.open(folder)
    forms = {name: source.form for name, source in checkpoint.sources.items()}
    return loading.least_memory(checkpoint.config, find("numpy", "CPU", "float64"), forms)


@pytest.mark.parametrize("form", [None, "modelopt", "affine", "fp8"])
@pytest.mark.parametrize("shards", [1, 2])
def test_the_limit_is_what_a_small_context_takes(
    form: str | None, shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_quantized(tmp_path, form, shards=shards) if form else make_checkpoint(tmp_path)
    machine_of(monkeypatch, needed(folder))
    dgemma.load(folder, "numpy")
    machine_of(monkeypatch, needed(folder) - 1)
    refused(BackendError, "in float64", model=folder, backend="numpy")
    dgemma.load(folder, "numpy", force=True)


def test_forms_are_known_from_an_index_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_quantized(tmp_path, "modelopt", shards=2)
    most = needed(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    hub = Hub(folder, monkeypatch)
    machine_of(monkeypatch, most - 1)
    refused(BackendError, "in float64", model="org/name", backend="numpy")
    machine_of(monkeypatch, most)
    refused(CheckpointError, "missing shard", model="org/name", backend="numpy")
    assert hub.asked[-1] == "weights"


def test_a_device_that_is_too_small_comes_before_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(make_checkpoint(tmp_path), monkeypatch)
    monkeypatch.setattr(NumpyOps, "total_memory", lambda self: 1000)
    machine_of(monkeypatch, None)
    monkeypatch.setattr(loading, "_on_host", lambda *_: None)
    refused(BackendError, "all memory is 0.00 GB", model="org/name", backend="numpy")
    assert hub.asked == ["small files", "framework"]


@pytest.mark.parametrize("total", [None, 10**15])
def test_unknown_or_ample_memory_says_nothing(
    total: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_of(monkeypatch, total, total)
    said = Said()
    dgemma.load(make_checkpoint(tmp_path), "numpy", notices=said)
    assert said.texts == []


def test_memory_that_others_hold_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine_of(monkeypatch, 10**15, 1000)
    said = Said()
    dgemma.load(make_checkpoint(tmp_path), "numpy", notices=said)
    (text,) = said.texts
    assert "memory may run out" in text


RELEASED = read_config(load_json(RELEASED_DIR / "config.json"))
ON_A_MAC, ON_A_GPU = find("mlx", "GPU", "bfloat16"), find("cuda", "GPU", "float32")


@pytest.mark.parametrize(
    ("backend", "gigabytes", "said"),
    [
        (ON_A_MAC, 32, "--to mlx --preset quality makes"),
        (ON_A_MAC, 24, "--to mlx --preset balanced makes"),
        (ON_A_MAC, 14, "--to mlx --preset small makes"),
        (ON_A_MAC, 8, "no preset of dgemma convert fits, as the smallest takes 12.49 GB"),
        (ON_A_GPU, 24, "--to nvfp4 --preset quality makes"),
        (ON_A_GPU, 19, "--to nvfp4 --preset small makes"),
        (ON_A_GPU, 16, "--to nvfp4 --preset small and --dtype bfloat16 makes one of 15.89 GB"),
    ],
)
def test_a_refusal_names_the_largest_preset_that_fits(backend: Backend, gigabytes: int, said: str) -> None:
    text = loading.too_large("a b", RELEASED, backend, 10**12, gigabytes * 10**9)
    assert said in text and "\n" not in text
    sizes = {
        loading.least_memory(RELEASED, backend, preset_forms(words, text_parameters(RELEASED)))
        for words in PRESETS[loading.TARGETS[backend.name]].values()
    }
    if "--dtype" not in said and (fitting := [size for size in sizes if size <= gigabytes * 10**9]):
        assert f"dgemma convert 'a b' DEST {said} one of {max(fitting) / 1e9:.2f} GB" in text


def test_force_loads_what_exceeds_all_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine_of(monkeypatch, 1000)
    command = ["generate", "--backend", "numpy", "--seed", "1", "--steps", "1", "--max-tokens", "1", "a"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1 and "--force tries it" in result.stderr
    assert CliRunner().invoke(main, [*command, "--force"]).exit_code == 0


# ---- the machine --------------------------------------------------------------------------------

KIB = {"MemTotal": 16_000, "MemAvailable": 9_000, "SwapTotal": 2_000}


def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    """A machine whose system files say this."""
    lines = "".join(f"{name}: {value} kB\n" for name, value in KIB.items())
    for name, text in ({"proc/meminfo": lines} | files).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(machine, "_address_space", lambda: iter(()))


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"
GROUPS: dict[str, tuple[dict[str, str], int, int]] = {  # files, total and free in KiB
    "none": ({}, 18_000, 9_000),
    "no limit": ({"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": "max\n"}, 18_000, 9_000),
    "a container": (
        {
            "proc/self/cgroup": "0::/\n",
            f"{V2}/memory.max": f"{4_000 << 10}\n",
            f"{V2}/memory.current": f"{1_000 << 10}\n",
            f"{V2}/memory.stat": f"anon 5\nfile {600 << 10}\n",
        },
        6_000,
        3_600,
    ),
    "a group above": (
        {
            "proc/self/cgroup": "0::/user/a/b\n",
            f"{V2}/user/a/b/memory.max": "max\n",
            f"{V2}/user/memory.max": f"{5_000 << 10}\n",
            f"{V2}/user/memory.current": "0\n",
        },
        7_000,
        5_000,
    ),
    "more than there is": (
        {"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": f"{1 << 40}\n"},
        18_000,
        9_000,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "5:cpu,memory:/docker/x\n1:name=systemd:/\n",
            f"{V1}/memory.limit_in_bytes": f"{3_000 << 10}\n",
            f"{V1}/memory.usage_in_bytes": f"{2_000 << 10}\n",
            f"{V1}/memory.stat": f"total_cache {500 << 10}\n",
        },
        5_000,
        1_500,
    ),
    "version 1 without a limit": (
        {"proc/self/cgroup": "5:memory:/\n", f"{V1}/memory.limit_in_bytes": "9223372036854771712\n"},
        18_000,
        9_000,
    ),
    "nonsense": ({"proc/self/cgroup": "x\n:\n\n", f"{V2}/memory.max": "?\n"}, 18_000, 9_000),
}


@pytest.mark.parametrize(("files", "total", "free"), GROUPS.values(), ids=list(GROUPS))
def test_memory_of_a_linux_machine(
    files: dict[str, str], total: int, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root(tmp_path, monkeypatch, files)
    assert (machine.total_memory(), machine.free_memory()) == (total << 10, free << 10)


def test_a_limit_on_addresses_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    root(tmp_path, monkeypatch, {})
    monkeypatch.undo()
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    for limit, most in ((resource.RLIM_INFINITY, 18_000 << 10), (1000, 1000)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert machine.total_memory() == most


def test_machines_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(machine, "_address_space", lambda: iter(()))
    pages = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(machine.os, "sysconf", pages.__getitem__, raising=False)
    assert (machine.total_memory(), machine.free_memory()) == (4_096_000, 3_072_000)
    monkeypatch.delattr(machine.os, "sysconf")  # Windows
    assert (machine.total_memory(), machine.free_memory()) == (None, None)


# ---- tokens -------------------------------------------------------------------------------------


def test_tokens_beyond_the_vocabulary_are_said(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, small(vocab_size=480), tokenizer=True)
    said = Said()
    model = dgemma.load(folder, "numpy", notices=said)
    model.tokenizer.raw.add_tokens([f"<new {i}>" for i in range(3)])
    model.tokenizer.raw.save(str(folder / "tokenizer.json"))
    before = len(said.texts)
    dgemma.load(folder, "numpy", notices=said)
    assert before == 0
    (text,) = said.texts
    assert "tokenizer.json: 3 of its tokens" in text and "480" in text
    write_json(folder / "generation_config.json", {"eos_token_id": 482})
    refused(ConfigError, "eos_token_id 482", model=folder, backend="numpy")


def test_a_request_is_checked_before_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that refuses the messages, and a reply beyond the positions, do not wait for gigabytes."""
    folder = make_checkpoint(tmp_path, small(vocab_size=480), tokenizer=True)
    monkeypatch.setattr(Checkpoint, "load", lambda *args, **options: pytest.fail("weights are read"))
    args = ["generate", "--model", str(folder), "--backend", "numpy", "x"]
    for more in (["--max-tokens", "2000000000"], ["--t-max", "0.01"], ["--continue"]):
        result = CliRunner().invoke(main, [*args, *more])
        assert (result.exit_code, result.stdout) == (1, "") and "dgemma: error: " in result.stderr
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no ' ~ messages[0].content) }}")
    assert "refused these messages: no x" in CliRunner().invoke(main, args).stderr
