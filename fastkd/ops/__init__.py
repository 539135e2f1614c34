"""Floor 2: autograd functions, chunk plans and numerics; knows nothing of models or batches."""
