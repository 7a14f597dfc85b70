"""What MLX's Metal backend launches for each primitive; importing this makes every rule known to `Walk`."""

from benchmarks.launches.rules import elementwise, gathers, kernels, products, rows, views

__all__ = ["elementwise", "gathers", "kernels", "products", "rows", "views"]
