"""One slide of a run, to look at in a browser: its pixels and its nuclei in tiles, served to this machine alone.

page/openseadragon.min.js is that of npm's package openseadragon 6.1.1, less its last line, which names a source map;
its licence lies beside it. A new version may ask for another hash in server.py's policy: the test in a browser tells.
"""
