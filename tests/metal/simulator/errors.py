"""The one exception of the simulator."""


class SimulatorError(RuntimeError):
    """A kernel is wrong or cannot be simulated here; `line` is that of the generated source, or 0.

    MLX raises a RuntimeError, too, where a kernel does not compile.
    """

    def __init__(self, message: str, line: int = 0):
        super().__init__(message)
        self.line = line
