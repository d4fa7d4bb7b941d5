"""Score networks against annotated nuclei, calibrate Sobel constants, and compare with published scores."""
