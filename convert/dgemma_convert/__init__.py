"""Converts checkpoints between formats, a piece at a time: `dgemma convert`, `python -m dgemma_convert`.

`recipe` says what each class of weight becomes, and a module a format (`bf16`, `mlx`, `nvfp4`) what the files
look like. `plan` works out which tensors that makes, `encode` computes them, and `stream` writes them so that
an interrupted run can go on. `source` reads what is converted, `place` and `lock` find and keep the folder
that is written, and `record` tells a finished conversion from a damaged one. It needs the base install alone.
"""
