"""dgemma: an engine for DiffusionGemma, from one model graph to MLX, PyTorch CUDA and NumPy.

    import dgemma
    model = dgemma.load()                                    # the embedded model; or a folder or hub id
    for event in model.generate([{"role": "user", "content": 'Reverse "canvas".'}], seed=0):
        if isinstance(event, dgemma.Done):
            print(event.text)

This module imports no framework; `load` imports that of its backend. Each name is imported when it is asked
for, so that the command answers Ctrl-C before NumPy has come.
"""

from importlib import import_module

TYPE_CHECKING = False  # as type checkers know it; `typing` is not needed before a framework is
if TYPE_CHECKING:
    from dgemma.engine.engine import Engine
    from dgemma.engine.events import Committed, Done, Draft, Event, Prefill, Stats
    from dgemma.engine.handle import Handle
    from dgemma.engine.request import Request
    from dgemma.engine.sampler import Step
    from dgemma.errors import (
        BackendError,
        CheckpointError,
        ConfigError,
        DgemmaError,
        PromptError,
        QueueFullError,
    )
    from dgemma.loading import load
    from dgemma.model import Model
    from dgemma.network.context import Context

__version__ = "0.1.0"

_HOMES = {
    "engine.engine": ("Engine",),
    "engine.handle": ("Handle",),
    "engine.request": ("Request",),
    "engine.events": ("Committed", "Done", "Draft", "Event", "Prefill", "Stats"),
    "engine.sampler": ("Step",),
    "errors": (
        "BackendError",
        "CheckpointError",
        "ConfigError",
        "DgemmaError",
        "PromptError",
        "QueueFullError",
    ),
    "loading": ("load",),
    "model": ("Model",),
    "network.context": ("Context",),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"dgemma.{home}"), name)
            return value
    raise AttributeError(f"module 'dgemma' has no attribute {name!r}")


__all__ = [
    "BackendError",
    "CheckpointError",
    "Committed",
    "ConfigError",
    "Context",
    "DgemmaError",
    "Done",
    "Draft",
    "Engine",
    "Event",
    "Handle",
    "Model",
    "Prefill",
    "PromptError",
    "QueueFullError",
    "Request",
    "Stats",
    "Step",
    "load",
]
