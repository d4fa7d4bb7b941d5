"""The cohort: which slides, where their results lie, and what is done."""
