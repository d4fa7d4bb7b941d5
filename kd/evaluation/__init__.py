"""Scores against annotated nuclei, calibration and published tables."""
