"""Commands of `hover-batch`: one function per command, registered by `hover_batch.cli`.

Heavy imports are inside the functions, so that `--help` answers at once.
"""
