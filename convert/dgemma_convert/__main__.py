"""`python -m dgemma_convert`: `dgemma convert`, under this package's name."""

from dgemma.cli import convert

if __name__ == "__main__":
    convert(prog_name="python -m dgemma_convert")
