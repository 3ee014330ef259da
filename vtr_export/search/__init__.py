"""From a calibration set to a schedule: G-Search and P-Sigmoid (arXiv 2412.00556)."""
