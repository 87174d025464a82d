"""Settings: bash scripts read into typed dataclasses, and checked."""
