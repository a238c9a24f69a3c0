"""Triton kernels of the forms. Imported at the first CUDA call only: importing ``custom_ops`` must not import triton."""
