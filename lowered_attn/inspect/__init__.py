"""Look at what the compiler makes of a model's attention, for a GPU that need not be there.

    lowered-attn inspect module:callable --arch sm_90

`target` finds the callable, `capture` compiles it and collects what can be shown, `calls` measures its attention,
`page` and `text` show it.
"""
