"""Read slides: pixels on the inference grid, tissue, and the units that cover it."""
