"""The standalone tokenizing command."""
