"""`python -m dgemma_convert`: `dgemma convert`, under this package's name."""

from dgemma_convert.command import convert

if __name__ == "__main__":
    convert(prog_name="python -m dgemma_convert")
