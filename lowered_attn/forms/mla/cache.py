"""The cache of latents that a stream of tokens, or of segments, is attended to through."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowered_attn.checks import check_int, fail
from lowered_attn.metadata import is_debug

WHERE = "LatentCache"


class LatentCache(nn.Module):
    """Latents of the tokens so far, one vector a token for all heads: [batch, capacity, width].

    Lengths live on the device and shapes never change, so every step is one graph, compiled once, and may be
    recorded as a CUDA graph. It is a module so that its tensors are buffers, which Dynamo takes for inputs that
    keep their address: Inductor would not record a CUDA graph that writes to any other input. The buffers are
    not part of a state_dict. One cache serves one layer. Inference only.

    Slots past a request's length are never read, and `key_padding` hides them: what an earlier stream left
    there, NaN too, reaches no output.

    A request that would grow past the capacity raises ValueError on a CPU, and in debug mode
    (`lowered_attn.set_debug`) on CUDA, where looking at lengths means a sync. Otherwise, and compiled, the
    store's own bounds check fails on the device. It is never cut off silently.
    """

    data: Tensor
    """The latents, [batch, capacity, width], zeros at first. Token i of request b is data[b, i]."""
    lengths: Tensor
    """int32 [batch], on the device: tokens of each request so far, hidden ones included."""
    hidden: Tensor
    """bool [batch, capacity]: slots whose token was padding when it was appended."""
    positions: Tensor | None
    """int64 [batch, capacity]: each key's position for RoPE; None where slots are positions, or none has any."""

    def __init__(
        self,
        batch: int,
        capacity: int,
        width: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        positions: bool = False,
    ) -> None:
        super().__init__()
        for name, value in {"batch": batch, "capacity": capacity, "width": width}.items():
            check_int(WHERE, name, value, 1)
        slots = (batch, capacity)
        buffers = {
            "data": torch.zeros(*slots, width, dtype=dtype, device=device),
            "lengths": torch.zeros(batch, dtype=torch.int32, device=device),
            "hidden": torch.zeros(slots, dtype=torch.bool, device=device),
            "positions": torch.zeros(slots, dtype=torch.int64, device=device) if positions else None,
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    @property
    def capacity(self) -> int:
        """Tokens that a request may have."""
        return self.data.shape[1]

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{list(self.data.shape)}, {self.data.dtype}"

    @property
    def key_padding(self) -> Tensor:
        """bool [batch, capacity], True = nothing to attend to: a padded token, or a slot that has none yet."""
        slots = torch.arange(self.capacity, device=self.data.device)
        return self.hidden | (slots >= self.lengths.unsqueeze(1))

    def append(self, latent: Tensor, key_padding: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Store the latents [batch, new, width] behind each request's own; return the lengths before, int32 [batch].

        key_padding bool [batch, new], True = hidden from every query, now and later; positions int32 or int64
        [batch, new], exactly where the cache was made with positions=True. `new` may be 0. Writes in place, with
        no host sync. ValueError where a shape, dtype or device does not fit, where gradients would be recorded,
        and where the cache is full (see the class).
        """
        self._check(latent, key_padding, positions)
        batch, new, _ = latent.shape
        start = self.lengths.clone()
        rows = torch.arange(batch, device=latent.device).unsqueeze(1)
        slots = start.unsqueeze(1) + torch.arange(new, device=latent.device)
        self.data[rows, slots] = latent
        # Written where nothing is hidden too: after `truncate` the slot may have been a padded token's.
        if key_padding is None:
            key_padding = latent.new_zeros(batch, new, dtype=torch.bool)
        self.hidden[rows, slots] = key_padding
        if self.positions is not None and positions is not None:
            self.positions[rows, slots] = positions.to(torch.int64)
        self.lengths.add_(new)
        return start

    def truncate(self, lengths: Tensor) -> None:
        """Forget what lies past `lengths` (int32 or int64 [batch], at least 0); a shorter request stays as it is.

        With it, prompts padded at their end go on at their own lengths, and rejected drafts are taken back. No host
        sync.
        """
        if lengths.shape != self.lengths.shape or lengths.is_floating_point():
            got = f"shape {list(lengths.shape)}, {lengths.dtype}"
            fail(WHERE, "lengths", f"integers of shape {list(self.lengths.shape)}", got, "pass one length a request")
        if self._may_look() and lengths.numel() and int(lengths.min()) < 0:
            fail(WHERE, "lengths", "at least 0", int(lengths.min()), "pass how many tokens to keep")
        self.lengths.copy_(torch.minimum(self.lengths, lengths.to(torch.int32)))

    def reset(self) -> None:
        """Forget everything: the next tokens are the first of new streams."""
        self.lengths.zero_()

    def _may_look(self) -> bool:
        # Traced, is_compiling() is a constant, so that neither values nor debug mode are read there.
        return not torch.compiler.is_compiling() and (self.lengths.device.type == "cpu" or is_debug())

    def _check(self, latent: Tensor, key_padding: Tensor | None, positions: Tensor | None) -> None:
        batch, capacity, width = self.data.shape
        if latent.dim() != 3 or (latent.shape[0], latent.shape[2]) != (batch, width):
            remedy = "make the cache for this batch and with this module's make_cache"
            fail(WHERE, "latent", f"shape [{batch}, new, {width}]", f"shape {list(latent.shape)}", remedy)
        for what in ("dtype", "device"):
            mine, other = getattr(self.data, what), getattr(latent, what)
            if mine != other:
                fail(WHERE, "latent", f"the cache's {what}, {mine}", other, f"make the cache with {what}={other}")
        if torch.is_grad_enabled() and latent.requires_grad:
            remedy = "run the step under torch.no_grad(): there is no backward through a cache"
            fail(WHERE, "latent", "no gradient to be recorded", "requires_grad=True", remedy)
        new = latent.shape[1]
        if key_padding is not None and (key_padding.dtype != torch.bool or key_padding.shape != (batch, new)):
            got = f"shape {list(key_padding.shape)}, {key_padding.dtype}"
            fail(WHERE, "key_padding", f"bool of shape {[batch, new]}", got, "pass one entry a new token")
        if (positions is None) != (self.positions is None):
            expected = "none, as the cache has none" if self.positions is None else "positions, as the cache has them"
            remedy = "make the cache with positions=True exactly where keys have positions"
            fail(WHERE, "positions", expected, None if positions is None else "positions", remedy)
        if positions is not None and (positions.is_floating_point() or positions.shape != (batch, new)):
            got = f"shape {list(positions.shape)}, {positions.dtype}"
            fail(WHERE, "positions", f"integers of shape {[batch, new]}", got, "pass one whole position a new key")
        longest = int(self.lengths.max()) if self._may_look() else 0
        if longest + new > capacity:
            expected = f"at most {capacity} tokens a request"
            remedy = "make the cache with a larger capacity, or truncate or reset it"
            fail(WHERE, "capacity", expected, f"{longest} stored and {new} new", remedy)
