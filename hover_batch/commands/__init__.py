"""The commands of `hover-batch`: a function each, mounted by `hover_batch.cli`.

Heavy imports stand inside the functions, so that `--help` answers at once.
"""
