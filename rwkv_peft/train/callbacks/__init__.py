"""Callbacks of a training: what happens between its optimizer steps."""
