"""Triton kernels, each beside its plain twin in PyTorch, and the weight layouts that they read.

Importing this package imports no framework, and its modules import PyTorch only: Triton is loaded by the
first launch, because a machine without an NVIDIA GPU need not have it.
"""
