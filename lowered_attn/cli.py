"""The command `lowered-attn`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from inductor_passes.gpu_facts import GPUS
from inductor_passes.pretend_device import PretendGpuError
from lowered_attn.inspect import page, text
from lowered_attn.inspect.capture import inspect_callable
from lowered_attn.inspect.target import InspectError

OK, FAILED, USAGE, NOTHING = 0, 1, 2, 3
_EPILOG = f"""\
exit status: {OK} the page shows lowered attention; {FAILED} an error, which says what to do; {USAGE} a wrong command
line; {NOTHING} nothing was recognised: the page is written, and says so.

Code is imported with tensors that have shapes and no data, so a model of any size takes no memory, and nothing may read
a tensor's value. A module in eval mode is compiled without its backward; so is everything with --no-grad.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="lowered-attn", description="Attention for torch.compile.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser(
        "inspect", help="show what the compiler makes of a callable, for a GPU that need not be there",
        description="Compile a callable for a GPU that need not be there, and write what became of its attention: "
        "graphs, masks, generated Triton, PTX, resources and the roofline.",
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    inspect.add_argument("target", metavar="module:callable", help="a module, a class without arguments, a function")
    inspect.add_argument("--arch", choices=GPUS, default="sm_90", help="default: %(default)s")
    inspect.add_argument("--inputs", metavar="module:function", help="makes the inputs; default: example_inputs")
    inspect.add_argument("--output", type=Path, help="the page's file; default: inspect.html, none with --text")
    inspect.add_argument("--text", action="store_true", help="print the same as text")
    inspect.add_argument("--ptx", action="store_true", help="with --text: print PTX too, which a page always has")
    inspect.add_argument("--no-grad", action="store_true", help="compile as under torch.no_grad()")
    inspect.add_argument(
        "--library-kernels", action="store_true",
        help="allow kernels that Inductor cannot fuse into, as compiling does by default",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    return _inspect(options)


def _inspect(options: argparse.Namespace) -> int:
    try:
        found = inspect_callable(
            options.target, options.arch, options.inputs,
            gradients=not options.no_grad, library=options.library_kernels,
        )  # fmt: skip
        if options.text:
            print(text.render(found, ptx=options.ptx), end="")
        output = options.output or (None if options.text else Path("inspect.html"))
        if output is not None:
            output.write_text(page.render(found), encoding="utf-8")
            print(f"{text.verdict(found)}\nwrote {output}", file=sys.stderr)
    except (InspectError, PretendGpuError, OSError) as error:
        print(f"lowered-attn inspect: {error}", file=sys.stderr)
        return FAILED
    return OK if found.recognised else NOTHING


if __name__ == "__main__":
    sys.exit(main())
