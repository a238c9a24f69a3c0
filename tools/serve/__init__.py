"""A small serving loop over paged attention: continuous batching, one CUDA graph a batch shape, every step checked.

    python -m tools.serve               serves random requests and checks every step's logits
    python -m tools.serve.soak          a thousand random steps of attention alone, against plain dense attention
    python -m tools.serve.whole_step    one whole step of an 8B-shaped model as one CUDA graph, and where its time goes

Each takes `--help`. A step is one call of a compiled model on flat tokens. What differs between steps (lengths, page
tables, slots) lies in tensors that the model's attention fetches, so nothing is compiled or recorded after warm-up.
"""
