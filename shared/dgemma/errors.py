"""The exceptions that a user may see. Each says in one line what is wrong and what to do.

Anything else that escapes (AssertionError, TypeError, ...) is a bug of ours and keeps its traceback.
"""


class DgemmaError(Exception):
    """Base of every error whose cause is input: files, configuration, arguments, the machine."""


class ConfigError(DgemmaError):
    """config.json or generation_config.json lacks a key, or has a value we cannot serve."""


class CheckpointError(DgemmaError):
    """A checkpoint's files or tensors are not what its config.json describes."""


class PromptError(DgemmaError):
    """A message list, a template or a token id that cannot be rendered or encoded."""


class BackendError(DgemmaError):
    """The requested backend, device or number type is not available on this machine."""
