"""What a backend must offer: a few primitives to fill in, and composites that are defined here.

A primitive raises until a backend supplies it. A composite's body *is* its definition, written with
primitives. A backend overrides one only if a measurement says it is faster, and a test compares the override
with this body on NumPy float64. No formula of the model lives outside this package.

Each file has one kind and builds on the one before:

    arrays      arrays of the backend, their types, elementwise operations and reductions
    runtime     memory, compiling, evaluation, notices
    decoding    weights on the device, and products with them
    layers      norms, attention, experts
    vocabulary  embeddings, logits, samples, soft embeddings
    few         samples from a few tokens
"""

from dgemma.network.ops.arrays import KV, Array, Past
from dgemma.network.ops.layers import Mask
from dgemma.network.ops.runtime import Notices
from dgemma.network.ops.vocabulary import Bias, Prediction, Vocabulary

__all__ = ["KV", "Array", "Bias", "Mask", "Notices", "Ops", "Past", "Prediction"]


class Ops(Vocabulary):
    """Base of the backends: all of the above."""
