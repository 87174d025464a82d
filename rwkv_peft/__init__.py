"""Fine-tune RWKV language models."""

__version__ = "0.1.0"
