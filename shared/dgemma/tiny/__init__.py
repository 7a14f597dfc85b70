"""The embedded model `tiny`: a checkpoint with tokenizer and chat template.

`tiny` has the full architecture at about three million parameters, so the engine and every backend can be
tried without a download. The price: it knows the toy tasks that it was trained on and nothing else.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "checkpoint"
