"""Tokenizer, roles, prompt templates."""
