"""Models that answer calibration questions under a candidate."""
