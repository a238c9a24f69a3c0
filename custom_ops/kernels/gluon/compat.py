"""Names of Gluon that changed between the versions of Triton that are supported, 3.6 to 3.9."""

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# 3.9 renamed it.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
# 3.9 made it public.
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
# 3.7 renamed it. In a warp-specialised kernel it waits for the warps of the role that calls it.
warpgroup_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
