"""Scores against annotated nuclei, calibration of Sobel constants, and tables of published scores."""
