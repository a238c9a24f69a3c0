"""Other libraries' hooks, each imported by its users alone: ``import lowered_attn.integrations.transformers``."""
