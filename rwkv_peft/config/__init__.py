"""Settings: read from the scripts, checked, typed."""
