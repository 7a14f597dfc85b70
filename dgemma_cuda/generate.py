"""`python -m dgemma_cuda.generate`: `dgemma generate`, under this package's name.

It is the same command with the same options, `--backend` included, and imports no framework of its own.
"""

from dgemma.commands.generate import generate

if __name__ == "__main__":
    generate(prog_name="python -m dgemma_cuda.generate")
