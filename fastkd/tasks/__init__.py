"""Rows of text, tokenised corpora, task examples and metrics."""
