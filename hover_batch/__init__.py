"""Segment and classify every nucleus in cohorts of H&E whole-slide images."""

__version__ = "0.1.0"
