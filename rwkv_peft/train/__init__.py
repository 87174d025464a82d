"""Training: set up a run, train it, report."""
