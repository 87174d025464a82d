"""What several tests share. A test imports this package, never another test."""
