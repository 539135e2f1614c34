"""Transformers models: loading, the LM head, students on a kept vocabulary."""
