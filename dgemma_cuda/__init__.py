"""DiffusionGemma on NVIDIA GPUs, through PyTorch, Triton and CUDA.

This package is one class that fills `dgemma.network.ops.Ops`, a cache, and the kernels that a measurement
justified, under the same file names as `dgemma_mlx`. What the model means is in `dgemma`; no formula of it is
repeated here. Importing this package imports no framework: `torch` is loaded by the modules that need it.
"""
