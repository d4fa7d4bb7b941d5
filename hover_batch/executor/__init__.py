"""How a cohort is run; what is done for each slide stands in `hover_batch.pipeline`."""
