"""RWKV-7, -6 and -5: geometry, layers, state, initialisation, generation."""
