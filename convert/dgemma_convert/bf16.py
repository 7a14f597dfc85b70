"""bf16: the layout of Google's release, every parameter one bfloat16 tensor under Hugging Face's name."""

from dgemma.checkpoint.presets import PRESETS

from .target import Target


class Bf16Target(Target):
    name = "bf16"
    presets = PRESETS["bf16"]
