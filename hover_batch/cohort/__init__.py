"""Cohorts: their slides, the paths of results, and the record of what is done."""
