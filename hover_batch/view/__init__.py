"""One slide of a run, to look at in a browser: its pixels and its nuclei in tiles, served to this machine alone."""
