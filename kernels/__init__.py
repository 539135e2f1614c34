"""Triton kernels, installed as `fastkd.kernels`."""
