"""A run as HTML pages to look at: what is drawn, and how it is laid out; `hover_batch.reporting` gathers it."""
