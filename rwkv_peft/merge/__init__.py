"""Merge adapters and states into a base, and verify the result."""
