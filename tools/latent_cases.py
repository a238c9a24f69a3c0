"""The named cases of latent attention over a paged cache: DeepSeek's shapes, absorbed (512 latent and 64 rotary).

    python -m tools.bench --cases mla --output tools/results/mla.json

They are paged cases with one KV head whose value is the first part of its key.
"""

from __future__ import annotations

from dataclasses import replace

from tools.paged_cases import PagedCase, Target, decode

SCALE = 192**-0.5
"""DeepSeek's: of the head dim before absorption, 128 + 64."""

_ALL = ("ours", "ours-layer", "ours-direct", "ours-triton", "flashmla", "fa3")

_H128 = PagedCase(
    "mla_decode_b128_h128_k4096", "MLA decode B128 ctx 4096", decode(4096, 128), 64,
    query_heads=128, kv_heads=1, head_dim=576, value_dim=512, scale=SCALE,
    targets=(Target("ours", "flashmla", 0.8),), variants=_ALL,
    design_row="MLA decode B128 H128 ctx 4096 576/512 page 64",
)  # fmt: skip
_H16 = replace(
    _H128, name="mla_decode_b128_h16_k4096", query_heads=16, targets=(Target("ours", "fa3", 0.95),),
    aim_tb_per_s=3.9, design_row="MLA decode B128 H16 ctx 4096",
)  # fmt: skip

_LIST = (
    # The aim is 560 TFLOP/s of the products that a head makes with a key: 2 * (576 + 512).
    replace(_H128, aim_ms=_H128.flops / 560e9),
    _H16,
    *(
        replace(
            base, name=f"mla_{name}_h{base.query_heads}", label=f"MLA {label}", requests=requests, aim_ms=None,
            aim_tb_per_s=None, targets=(), variants=("ours", "ours-direct", "flashmla", "fa3"), design_row=None,
        )
        for name, label, requests in (
            ("verify_b64_q2_k4096", "verify B64 q2 ctx 4096", ((4094, 2),) * 64),
            ("decode_b1_k65536", "decode B1 ctx 65536", decode(65536, 1)),
            ("prefill_b4_q512_c2048", "chunked prefill B4 q512 ctx 2048", ((2048, 512),) * 4),
        )
        for base in (_H128, _H16)
    ),
)  # fmt: skip

LATENT_CASES: dict[str, PagedCase] = {case.name: case for case in _LIST}
"""Every latent case by name, in the order measured: the design's rows first."""
