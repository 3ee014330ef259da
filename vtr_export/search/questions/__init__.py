"""What is asked: calibration sets, metrics, and whether two results differ."""
