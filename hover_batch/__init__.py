"""Segment and classify every nucleus in cohorts of H&E whole-slide images."""
