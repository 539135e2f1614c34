"""Vocabulary counts, maps and pruned tokenizers; knows nothing of models or batches."""
