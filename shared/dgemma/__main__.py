"""The `dgemma` command: the script of that name, and `python -m dgemma`."""

from dgemma.commands import process


def main(prog_name: str = "dgemma") -> None:
    """Run the command that the process's arguments name, and exit."""
    process.take_over()
    # Signals are looked after before anything that takes time: an interrupted import is a traceback else.
    from dgemma.cli import main as command

    command(prog_name=prog_name)


if __name__ == "__main__":
    main("python -m dgemma")
