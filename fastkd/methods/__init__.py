"""The objectives, each readable top to bottom; knows nothing of optimizers, files or ranks."""
