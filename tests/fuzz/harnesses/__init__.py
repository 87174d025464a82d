"""One file per harness; each defines a class `It`, a fuzz.harness.Harness."""
