"""dgemma: an engine for DiffusionGemma, from one model graph to MLX, PyTorch CUDA and NumPy.

    import dgemma
    model = dgemma.load()                                    # the embedded model; or a folder or hub id
    for event in model.generate([{"role": "user", "content": 'Reverse "canvas".'}], seed=0):
        if isinstance(event, dgemma.Done):
            print(event.text)

This module imports no framework; `load` imports that of its backend.
"""

from dgemma.engine.events import Committed, Done, Draft, Event, Prefill, Stats
from dgemma.engine.sampler import Step
from dgemma.errors import BackendError, CheckpointError, ConfigError, DgemmaError, PromptError
from dgemma.loading import load
from dgemma.model import Model
from dgemma.network.runner import Context

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "CheckpointError",
    "Committed",
    "ConfigError",
    "Context",
    "DgemmaError",
    "Done",
    "Draft",
    "Event",
    "Model",
    "Prefill",
    "PromptError",
    "Stats",
    "Step",
    "load",
]
