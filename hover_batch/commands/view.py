"""`hover-batch view`: one slide and its nuclei in the browser."""

from __future__ import annotations

import threading
import webbrowser
from typing import Annotated

import typer

from hover_batch.commands.options import RunArgument


def view(
    run: RunArgument,
    slide: Annotated[
        str | None, typer.Option(metavar="ID", help="The slide to look at.", show_default="the run's only one")
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of this machine to listen at.", show_default="any that is free")
    ] = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Print the address, and open no browser.")] = False,
) -> None:
    """Look at one slide and its nuclei in the browser. Ctrl-C ends it, with exit code 0.

    Zoomed out, it draws the density of the nuclei; zoomed in, their outlines. Point at one to see its row of the table.

    The address that is printed holds a secret and is for this machine alone.

    From another machine: ssh -L 8000:localhost:8000 HOST, and --port 8000 there.

    hover-batch view out/ --slide case-01
    """
    from hover_batch.view.serve import serve

    with serve(run, slide, port, lambda line: typer.echo(line, err=True)) as server:
        try:
            typer.echo(server.url)
            if not no_browser:
                # In a thread, since a browser in a terminal blocks this call, and asks for the page meanwhile.
                threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
            server.serve_forever()
        except KeyboardInterrupt:
            return
