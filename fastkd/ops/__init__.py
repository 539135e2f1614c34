"""Autograd functions, chunk plans and numerics; knows nothing of models or batches."""
