"""Caches as a compiler should see them: each a tensor with a storage of its own."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils import dlpack

# One alias for one piece of memory: two layers that share a cache must share a graph input, or the order of a store and
# a read would be free. An alias keeps its memory alive, so an address cannot come back while its entry is here.
_aliases: weakref.WeakValueDictionary[tuple, Tensor] = weakref.WeakValueDictionary()


def own_storage(cache: Tensor) -> Tensor:
    """`cache` itself where it fills its storage, else a tensor over the same memory that knows of no other.

    Engines cut the caches of all layers out of one allocation. Inductor (2.11 to 2.15) takes inputs of one storage for
    views of one another and clones each cache that a step writes to, once a layer and a step. They do not overlap, so
    the storage can be hidden from it. Caches of a tensor subclass or on another device than cpu and cuda stay as they
    are.
    """
    if type(cache) is not Tensor or cache.device.type not in ("cpu", "cuda") or cache.requires_grad:
        return cache
    if cache.numel() * cache.element_size() == cache.untyped_storage().nbytes():
        return cache
    key = (cache.data_ptr(), tuple(cache.shape), cache.stride(), cache.dtype, cache.device)
    alias = _aliases.get(key)
    if alias is None:
        # Bytes: float8 dtypes are not in every version's DLPack.
        raw = cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache
        alias = dlpack.from_dlpack(dlpack.to_dlpack(raw)).view(cache.dtype)
        _aliases[key] = alias
    return alias
