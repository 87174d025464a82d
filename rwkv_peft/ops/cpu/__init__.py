"""C++ kernels for CPUs and their autograd nodes."""
