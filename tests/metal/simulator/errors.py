"""The one exception of the simulator."""

from dgemma.errors import DgemmaError


class SimulatorError(DgemmaError):
    """A kernel is wrong or cannot be simulated here; `line` is that of the generated source, or 0."""

    def __init__(self, message: str, line: int = 0):
        super().__init__(message)
        self.line = line
