"""Floor 2: vocabulary counts, maps and pruned tokenizers; knows nothing of models or batches."""
