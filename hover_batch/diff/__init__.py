"""Compare the results of two runs on the same slides, nucleus by nucleus."""
