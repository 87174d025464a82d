"""From tokenized files to batches."""
