"""A search as one offline page."""
