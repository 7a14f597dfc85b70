"""`python -m dgemma_cuda.generate`: `dgemma generate`, under this package's name.

It is the same command with the same options, `--backend` included, and imports no framework of its own.
"""

from dgemma.commands import process

if __name__ == "__main__":
    process.take_over()  # before the imports, which take time
    from dgemma.commands.generate import generate

    generate(prog_name="python -m dgemma_cuda.generate")
