"""Read, check, cache and draw annotated images."""
