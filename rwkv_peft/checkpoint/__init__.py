"""Checkpoint files, their sidecars, run folders and saved training states."""
