"""Fuzzing: harnesses for everything that reads what other people have written. See __main__.py."""
