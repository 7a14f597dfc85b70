"""Folders with the embedded model's tokenizer, one thing in them changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dgemma.tiny import MODEL_DIR

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def make(folder: Path, template: str | None = None, **changes: Callable[[dict[str, Any]], Any]) -> Path:
    """A folder with its tokenizer; `changes` edit "tokenizer" (tokenizer.json) or "config"."""
    folder.mkdir(parents=True)
    for name in FILES:
        shutil.copy(MODEL_DIR / name, folder / name)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    for name, change in changes.items():
        path = folder / {"tokenizer": "tokenizer.json", "config": "tokenizer_config.json"}[name]
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
    return folder
