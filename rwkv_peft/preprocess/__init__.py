"""Rows of any file to tokens. Never imports torch."""
