"""The embedded model `tiny`: its tokenizer, chat template and the tasks it is trained and judged on.

`tiny` has the full architecture at about three million parameters, so the engine, the server and every
backend can be tried without a download. The price: it knows the toy tasks of `dgemma.tiny.tasks` and nothing
else.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "checkpoint"
