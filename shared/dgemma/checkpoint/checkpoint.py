"""A folder whose configuration and tensors are checked against each other, and its weights.

Every header is checked against its file, the index and the configuration before the first weight is read.
A load looks at a few values of each tensor only: scanning 51 GB for NaN would double its time.
`dgemma.reports.verify` looks at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgemma.checkpoint.faults import (
    Fault,
    expected_parameters,
    find_announcement,
    find_contradictions,
    find_faults,
    summary,
)
from dgemma.checkpoint.folder import find_tensors
from dgemma.checkpoint.layouts import detect
from dgemma.checkpoint.layouts.base import Layout, Source
from dgemma.checkpoint.records import make_record
from dgemma.checkpoint.safetensors import Entry
from dgemma.checkpoint.samples import check_samples
from dgemma.errors import CheckpointError
from dgemma.files import Progress, exists, load_json
from dgemma.formats.quantized import Quantized
from dgemma.formats.stored import Stored
from dgemma.network.build import build, constants
from dgemma.network.config import Config, read_config
from dgemma.network.ops import Ops
from dgemma.network.ops.decoding import dequantize
from dgemma.network.spec import Param, text_parameters
from dgemma.network.weights import Weights
from dgemma.settings import GenerationConfig, read_generation_config


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose configuration and tensors fit each other; no weight is read yet."""

    folder: Path
    config: Config
    generation: GenerationConfig
    layout: Layout
    entries: Mapping[str, Entry]  # every stored tensor by name, vision tower included
    sources: Mapping[str, Source]  # the storage of each parameter, by its name in the parameter table

    @classmethod
    def open(cls, folder: str | Path, check: bool = True) -> Checkpoint:
        """Read the headers of a folder.

        ConfigError for config.json and generation_config.json, CheckpointError for the tensors. Values
        are not read. `check=False` lets tensors be missing,
        wrong, or other than announced: `contradictions` and `faults` list it all. Such a checkpoint is for
        looking only.
        """
        folder = Path(folder)
        config, generation = read_configs(folder)
        announcement, announcer = find_announcement(folder, config)
        where, entries = find_tensors(folder)
        layout = detect(announcement, announcer, entries)
        sources = _sources(layout, expected_parameters(config, entries), len(entries), where)
        checkpoint = cls(folder, config, generation, layout, entries, sources)
        if check and (wrong := checkpoint.contradictions()):
            raise CheckpointError(f"{where}: {wrong[0]}")
        if check and (faults := checkpoint.faults()):
            raise CheckpointError(f"{where}: {summary(faults)}")
        return checkpoint

    def contradictions(self) -> list[str]:
        """Where the tensors contradict the quantization that config.json announces, or its silence."""
        return list(find_contradictions(self.layout, list(self.sources.values()), self.entries))

    def faults(self) -> list[Fault]:
        """Every tensor that differs from the parameter table and the layout."""
        wanted = {piece.name: piece for source in self.sources.values() for piece in source.pieces}
        return list(find_faults(wanted, self.entries))

    def read(self, name: str) -> Stored | Quantized:
        """A parameter as it is stored: a tensor, or a record whose fields are `Stored`.

        A stack of experts that a format takes apart is put together in memory of its own. Everything else is
        a map of its file.
        """
        source = self.sources[name]
        if source.form is None:
            return self.entries[source.pieces[0].name].read()
        return make_record(source, source.form, self.entries)

    def nbytes(self, name: str) -> int:
        """Stored bytes of a parameter, those that nothing reads included."""
        names = (piece.name for piece in self.sources[name].pieces)
        return sum(self.entries[name].nbytes for name in names if name in self.entries)

    def load(self, ops: Ops, progress: Progress | None = None) -> Weights:
        """The text model's weights on the device of `ops`.

        Each tensor is read once, in file order, so memory peaks about one parameter above the weights.
        `progress(done, total)` counts stored bytes. CheckpointError for a tensor that looks damaged at one of
        a few places.
        """
        table = sorted(text_parameters(self.config), key=self._position)
        total, done = sum(self.nbytes(param.name) for param in table), 0
        # A download that broke off shows at the end of its file, before minutes of reading.
        for last in {self._position(param)[0]: param for param in table}.values():
            check_samples(self.sources[last.name], self.entries)

        def leaf(param: Param) -> Any:
            nonlocal done
            array = self._leaf(ops, param)
            # Where the load has just been: elsewhere each look would wait for the disk.
            for odd in check_samples(self.sources[param.name], self.entries):
                ops.notices.say(odd)
            done += self.nbytes(param.name)
            if progress:
                progress(done, total)
            return array

        return build(self.config, table, leaf, constants(self.config, ops), ops)

    def _leaf(self, ops: Ops, param: Param) -> Any:
        """A parameter on the device: an array of its shape, or a record."""
        stored = self.read(param.name)
        if isinstance(stored, Quantized):
            record = ops.upload(stored)
            if param.wide:  # the router: its logits must be wide, as they tie in bfloat16
                return dequantize(ops, record)
            # Tokens and self-conditioning look up rows of the embedding, so its rows stay as they are.
            return record if param.group == "embed" else ops.arrange(record, str(param.path[-1]))
        return ops.load(stored, wide=param.wide)

    def _position(self, param: Param) -> tuple[str, int]:
        entry = self.entries[self.sources[param.name].pieces[0].name]
        return entry.file.name, entry.offset


def _sources(layout: Layout, params: list[Param], stored: int, where: Path) -> dict[str, Source]:
    """The storage of each parameter by name; CheckpointError if it asks for far more tensors than `stored`.

    Layers times experts of a false configuration would else make a table that fills the memory.
    """
    sources: dict[str, Source] = {}
    count = 0
    for param in params:
        sources[param.name] = layout.source(param)
        count += len(sources[param.name].pieces)
        if count > 2 * stored + 100_000:
            raise CheckpointError(
                f"{where}: holds {stored:,} tensors, but config.json asks for over {count:,}"
            )
    return sources


def read_configs(folder: Path) -> tuple[Config, GenerationConfig]:
    """config.json and generation_config.json of a folder; ConfigError for either."""
    path = folder / "config.json"
    raw = load_json(path)
    config = read_config(raw, str(path))
    path = folder / "generation_config.json"
    own = load_json(path) if exists(path) else None
    return config, read_generation_config(own, config.vocab_size, str(path), raw)
