"""View one slide of a run: a server, for this machine only, of a page with the slide and its nuclei in tiles.

page/openseadragon.min.js is from the npm package openseadragon 6.1.1, without its last line, which names a source map;
its licence is next to it. A new version may need another hash in the policy in server.py;
tests/view/test_view_in_browser.py then fails.
"""
