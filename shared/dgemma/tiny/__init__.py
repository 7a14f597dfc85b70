"""The embedded model `tiny`: a checkpoint with tokenizer and chat template.

`tiny` has the full architecture at about three million parameters, so anybody can try the engine and every
backend without a download. The price: it knows the toy tasks of its training and nothing else.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "checkpoint"
