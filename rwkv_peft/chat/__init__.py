"""Load a model to chat with, and diagnose a training run."""
