"""The command line: parse, call one function, print its report."""

from vtr_export.cli.app import export_main, main

__all__ = ["export_main", "main"]
