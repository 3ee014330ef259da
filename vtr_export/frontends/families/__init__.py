"""What some families 'code asks for: one module each."""
