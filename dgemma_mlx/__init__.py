"""DiffusionGemma on Apple silicon, through MLX.

This package is one class that fills `dgemma.network.ops.Ops`, a cache, and the Metal kernels that a
measurement justified. What the model means is in `dgemma`; no formula of it is repeated here. Importing this
package imports no framework: `mlx` is loaded by the modules that need it.
"""
