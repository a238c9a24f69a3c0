"""Inductor's frames around the kernels of ``custom_ops.kernels``."""
