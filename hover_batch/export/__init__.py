"""Write a run's results for people and other programs; `Format` in `cohort/layout.py` lists the formats."""
