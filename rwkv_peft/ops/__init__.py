"""Operators: definitions, torch versions, CPU and CUDA kernels, dispatch."""
