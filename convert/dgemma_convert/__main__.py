"""`python -m dgemma_convert`: `dgemma convert`, under this package's name."""

from dgemma.commands import process

if __name__ == "__main__":
    process.take_over()  # before the imports, which take time
    from dgemma_convert.command import convert

    convert(prog_name="python -m dgemma_convert")
