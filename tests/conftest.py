"""Triton as an interpreter where there is no GPU.

That has to be said before anything imports Triton, and transformers, which other tests import, does.
"""

import os
from importlib.util import find_spec

if find_spec("torch") and find_spec("triton"):
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
