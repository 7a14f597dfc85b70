"""`python -m dgemma`: the `dgemma` command."""

from dgemma.cli import main

if __name__ == "__main__":
    main(prog_name="python -m dgemma")
