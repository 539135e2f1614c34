"""Floor 3: transformers models: loading, the LM head, students on a kept vocabulary."""
