"""Annotated images: reading, checking, caching and drawing them."""
