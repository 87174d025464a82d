"""Adapters: trained changes of frozen linear layers, and how they are merged."""
