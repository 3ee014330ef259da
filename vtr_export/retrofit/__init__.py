"""Cuts for a decoder that another tool exported: checked, made canonical, cut, compared."""
