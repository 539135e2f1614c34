"""Floor 1: rows of text, tokenised corpora, task examples and metrics."""
