"""What every package uses: errors, paths, atomic writes, hashing, formatting."""
