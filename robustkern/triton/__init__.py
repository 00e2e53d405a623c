"""Triton kernels and their launchers, one module an op, imported when a CUDA tensor first asks."""
