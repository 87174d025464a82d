"""RWKV-7, -6 and -5: names and sizes, layers, state, initialisation, generation."""
