"""The command line: ``captum-fusion``, or ``python -m captum_fusion``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from captum_fusion import __version__
from captum_fusion._commands import demo, evaluate, explain, explore, methods
from captum_fusion._commands.common import CommandError

_DESCRIPTION = "See why a trained network decided: Fusion-CAM and its components, as Captum attributions."

_EPILOG = """\
examples:
  captum-fusion demo
  captum-fusion explain cat.jpg dog.jpg --model resnet50 --output maps
  captum-fusion explain cat.jpg --model squeezenet1_1 --weights squeezenet.safetensors --target "tiger cat"
  captum-fusion explain scan.png --model mypackage.models:build --weights best.pt --classes classes.txt \\
      --layers backbone.stage4 --methods union-cam --save-map
  captum-fusion explain cat.jpg --model resnet18 --methods grad-cam score-cam fusion-cam:theta=20
  captum-fusion explain dog_and_cat.jpg --model resnet50 --target "bull mastiff" "tiger cat"
  captum-fusion evaluate digits --model digits --output table
  captum-fusion evaluate imagenet/val --model resnet50 --preset fusioncam-table --limit 100 --output table
  captum-fusion evaluate imagenet/val --methods grad-cam fusion-cam captum.attr:Saliency --output table
  torchrun --nproc-per-node 4 -m captum_fusion evaluate imagenet/val --model resnet50 --output table
  captum-fusion explore cat.jpg dog.jpg --model resnet50 --open
  captum-fusion methods
"""

#: The exit code of a process that SIGPIPE ends, as shells report it.
_BROKEN_PIPE = 128 + 13


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments (sequence of str, optional): Default: None (those of the process)

    Returns:
        int: The exit code: 0; 2 for a mistake in the arguments, which standard error explains in one line; 141 if the
        reader of standard output has gone.

    Examples::

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     code = main(["demo", "--output", folder])  # doctest: +ELLIPSIS
        scene_...
        >>> code
        0
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            return _run(given)
        finally:
            sys.stdout.flush()  # a closed pipe raises here, not while the interpreter ends
    except BrokenPipeError:  # the reader has gone, as in "captum-fusion methods | head -1"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE


def _run(given: Sequence[str]) -> int:
    options = _parser().parse_args(given)
    options.arguments = given
    try:
        options.run(options)
    except CommandError as error:
        print(f"captum-fusion: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="captum-fusion",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"captum-fusion {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo.add(commands)
    explain.add(commands, _EPILOG)
    evaluate.add(commands, _EPILOG)
    explore.add(commands)
    methods.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
