"""Paged attention for serving: a cache in pages, requests of any lengths in one call, lengths read on the device.

Importing this package registers ``paged_attention``, ``paged_latent_attention``, a ``_reference`` of each,
``paged_schedule``, ``store_kv_cache`` and ``store_latent_cache`` in ``torch.ops.lowered_attn``, and imports no triton.
"""

from custom_ops.paged import attention as _attention  # noqa: F401  (registers)
from custom_ops.paged import latent as _latent  # noqa: F401
from custom_ops.paged import schedule as _schedule  # noqa: F401
from custom_ops.paged import store as _store  # noqa: F401
from custom_ops.paged.call import LatentCall, PagedCall
from custom_ops.paged.layout import LAYOUTS, CacheSizes, empty_caches

__all__ = ["LAYOUTS", "CacheSizes", "LatentCall", "PagedCall", "empty_caches"]
