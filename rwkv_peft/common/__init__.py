"""Helpers that every package uses: errors, paths, safe file access, formatting."""
