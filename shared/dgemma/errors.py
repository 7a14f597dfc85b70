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


class QueueFullError(DgemmaError):
    """Too many requests wait; the same one may be taken later."""


class BackendError(DgemmaError):
    """The requested backend, device or number type is not available on this machine."""


def visible(text: str) -> str:
    """Text for one line of a terminal: breaks are spaces, and what no letter is, such as ESC, an escape.

    Names of files and tensors may hold anything, half a surrogate pair too, which no stream takes.
    """
    shown = "".join(char if char.isprintable() or char.isspace() else _escaped(char) for char in text)
    return " ".join(shown.split())


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
