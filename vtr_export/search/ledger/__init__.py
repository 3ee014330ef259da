"""What a search has learned, on the disk."""
