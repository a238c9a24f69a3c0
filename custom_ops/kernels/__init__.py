"""Triton kernels of the forms, imported at the first CUDA call: importing ``custom_ops`` must not import triton."""
