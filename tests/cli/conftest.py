"""The checkpoint that the command's tests run: the embedded model, or a random one in its place."""

from pathlib import Path

import pytest

from dgemma.tiny import MODEL_DIR
from tests.checkpoints import make_checkpoint, small


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (MODEL_DIR / "config.json").exists():
        return MODEL_DIR
    return make_checkpoint(tmp_path_factory.mktemp("model"), small(vocab_size=480), tokenizer=True)
