"""`hover-batch view`: show one slide and its nuclei in the browser."""

from __future__ import annotations

import threading
import webbrowser
from typing import Annotated, Any

import typer

from hover_batch.commands.options import place


def view(
    run: Annotated[
        Any,
        typer.Argument(
            metavar="OUT",
            help="Folder of a run, as given to `segment --output` or --work, or folder or URL of a data set.",
            parser=place,
        ),
    ],
    slide: Annotated[
        str | None,
        typer.Option(metavar="ID", help="slide_id of the slide to show.", show_default="the only slide of the run"),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.", show_default="any free port")] = 0,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Print the address without opening a browser.")
    ] = False,
) -> None:
    """Show one slide and its nuclei in the browser, until you press Ctrl-C.

    Zoomed out, the page shows the density of the nuclei; zoomed in, their outlines. Point at a nucleus to see its row
    of the table.

    The printed address holds a secret token and works only on this machine.

    To view a run on a server, connect with `ssh -L 8000:localhost:8000 SERVER`, run `view` there with --no-browser
    --port 8000, and open the address that it prints.

    Example:

    hover-batch view out/ --slide case-01
    """
    from hover_batch.view.serve import serve

    with serve(run, slide, port, lambda line: typer.echo(line, err=True)) as server:
        try:
            typer.echo(server.url)
            if not no_browser:
                # In a thread, since a browser in a terminal blocks this call, while it requests the page from us.
                threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
            server.serve_forever()
        except KeyboardInterrupt:
            return
