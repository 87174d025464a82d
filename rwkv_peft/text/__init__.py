"""Prompt templates, roles and the tokenizer: how a dialogue becomes text and tokens."""
