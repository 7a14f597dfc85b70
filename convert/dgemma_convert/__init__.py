"""Checkpoint conversion for DiffusionGemma: one module a format.

Each module reads the parameters that `dgemma.spec` names and writes them in one number format, or reads them
back. The formats themselves, with their reference quantize and dequantize, belong to `dgemma`.
"""
