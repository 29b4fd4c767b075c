"""``captum-fusion explore``: the interactive explorer."""

from __future__ import annotations

import argparse
from typing import Any

from captum_fusion._commands.common import CommandError, add_network, add_score_fn
from captum_fusion.attr.catalog import METHODS
from captum_fusion.evaluation import methods
from captum_fusion.explore.recipes import FIRST, PANELS, checked
from captum_fusion.models import BUNDLED, first_line


def add(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "explore",
        help="explore pictures, classes, methods and layers in the browser",
        description="Serve a page to this computer, to explore pictures, classes, methods and layers of a network in "
        'the browser. Works offline. Needs Gradio: pip install "captum-fusion[app]".',
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="picture files (default: the bundled ones)")
    add_network(parser)
    parser.set_defaults(model=BUNDLED)
    what = parser.add_argument_group("the explanation")
    what.add_argument(
        "--methods",
        "--method",
        nargs="+",
        default=[],
        metavar="METHOD",
        help=f"names from 'captum-fusion methods', with options (fusion-cam:theta=20), separated by spaces or commas; "
        f"the page starts with the first {PANELS} (default: {FIRST})",
    )
    what.add_argument("--layer", metavar="LAYER", help="dotted name (default: the last convolutional stage)")
    add_score_fn(what)
    page = parser.add_argument_group("the page")
    page.add_argument("--port", type=int, metavar="PORT", help="its port (default: the first free one from 7860)")
    page.add_argument("--open", action="store_true", help="open it in the browser")
    page.add_argument("--share", action="store_true", help="also make a public link, through gradio.live (default: no)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    blocks = start(options)
    try:
        blocks.block_thread()
    except KeyboardInterrupt:
        print()
    finally:
        blocks.close()


def start(options: argparse.Namespace) -> Any:
    """Serve the page, and go on.

    Raises:
        CommandError: For wrong arguments, a missing package, or a port in use.
    """
    from captum_fusion.explore import load_page, sources
    from captum_fusion.explore.session import Session

    if options.port is not None and not 0 < options.port < 2**16:
        raise CommandError(f"port: it must be from 1 to {2**16 - 1}, not {options.port}")
    try:
        page = load_page()
        specs = checked(methods.split(options.methods, METHODS))
        loaded, source = sources.of_name(options.model, options.weights, options.classes, options.whole_image)
        session = Session(sources.moved(loaded, options.device), source, options.layer, options.score_fn)
        examples = sources.examples(options.images, options.model)
    except (ImportError, ValueError) as error:
        raise CommandError(str(error)) from error
    try:
        blocks = page.serve(
            session,
            examples,
            specs,
            server_name="127.0.0.1",
            server_port=options.port,
            share=options.share,
            inbrowser=options.open,
            prevent_thread_lock=True,
        )
    except OSError as error:
        taken = "no free port was found" if options.port is None else f"port {options.port} is not free"
        raise CommandError(f"port: {taken}; --port names another") from error
    except RuntimeError as error:
        raise CommandError(f"the page could not be served ({first_line(error)})") from error
    print(f"{loaded.name}, layer {session.layer}: {blocks.local_url} (Ctrl-C ends it)", flush=True)
    if options.share:
        print(f"public link: {blocks.share_url}", flush=True)
    return blocks
