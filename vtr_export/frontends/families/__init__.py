"""What the code of some families asks for: one module each."""
