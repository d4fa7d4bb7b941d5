"""Commands of `hover-batch kd`: one function per file, mounted by `kd.cli`.

Heavy imports are inside the functions, so that `--help` is fast.
"""
