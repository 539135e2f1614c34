"""Floor 1: Triton kernels, installed as `fastkd.kernels`."""
