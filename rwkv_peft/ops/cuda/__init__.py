"""CUDA kernels and their autograd nodes."""
