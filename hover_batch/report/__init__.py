"""Draw and lay out the HTML report of a run; `hover_batch.reporting` gathers its content."""
