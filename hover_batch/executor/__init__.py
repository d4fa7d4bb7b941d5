"""Run a cohort, in one process or on Ray. `hover_batch.pipeline` holds the steps for one slide."""
