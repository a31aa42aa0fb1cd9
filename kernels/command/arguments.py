"""The command line. Every choice comes from the library's own tables, so that none is missing or dead."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

import torch

from ..engine.file_job import NONFINITE
from ..numerics.formats import FORMATS
from ..numerics.rounding import METHODS
from ..numerics.scaling import SCALINGS
from ..selection.selection import LAYERS
from ..state_dict.layouts import LAYOUTS, MATMULS
from ..version import VERSION

FP8_TYPES = {name.removeprefix("float8_").removesuffix("fn"): name for name in FORMATS}
"""What --fp8_type takes -> format."""

ROUNDING_FLAGS = {"complex_neighbor": "complex_rounding", "shift_perturb": "shifturb"}
"""Flags that are not called after their rounding."""

SCALING_FLAGS = {"none": "no-scale"}

COMMANDS = """\
other commands:
  python -m kernels inspect FILE   is this scaled FP8 file sound, and what will each ComfyUI make of it?
  python -m kernels compare FILE   every rounding in both formats on the layers of this file

exit codes: 0 done, 1 a file cannot be used or written (inspect: has faults), 2 the command line is wrong
"""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The parsed arguments; `command` is a key of PARSERS. Raises SystemExit(2) where they are wrong."""
    name = arguments[0] if arguments and arguments[0] in ("inspect", "compare") else "quantize"
    parser, rest = PARSERS[name](), arguments if name == "quantize" else arguments[1:]
    options = parser.parse_args(rest)
    if name == "quantize" and options.dry_run and options.plot:
        parser.error("--plot draws what quantizing did: it cannot go with --dry-run")
    options.command = name
    return options


def recipe_choices(options: argparse.Namespace) -> dict:
    """What quantize_file and plan_file take."""
    return {
        "format": FP8_TYPES[options.fp8_type],
        "rounding": options.rounding,
        "layout": options.layout,
        "matmul": options.matmul,
        "nonfinite": options.nonfinite,
        "calibration": options.calibration,
        **layer_choices(options),
    }


def layer_choices(options: argparse.Namespace) -> dict:
    """Those that say which layers, and how they are scaled and drawn."""
    return {
        "scaling": options.scaling,
        "seed": options.seed,
        "layers": options.preset,
        "keep": options.keep,
        "only": options.only,
        "suffixes": options.keys_to_quantize_suffix,
    }


def _quantize_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "IN OUT [option ...]", "Quantize a .safetensors model file to scaled FP8, which ComfyUI loads.", epilog=COMMANDS
    )
    parser.add_argument("--version", action="version", version=VERSION)
    parser.add_argument("source", metavar="IN", help="a .safetensors file, or the .safetensors.index.json of a set")
    parser.add_argument("target", metavar="OUT", help="the .safetensors file to write")
    parser.add_argument("--fp8_type", choices=FP8_TYPES, default="e4m3", help="default: e4m3")
    roundings = parser.add_argument_group("rounding, one of").add_mutually_exclusive_group()
    _add_flags(roundings, "rounding", METHODS, ROUNDING_FLAGS, default="stochastic")
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="what Save FP8 Calibration wrote: for --calibrated, and for the range of activations with --matmul fp8",
    )
    _add_layer_arguments(parser)
    file = parser.add_argument_group("the file")
    _add_choice(file, "--layout", LAYOUTS)
    _add_choice(file, "--matmul", MATMULS)
    _add_choice(file, "--nonfinite", NONFINITE)
    file.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    file.add_argument("--requantize", action="store_true", help="allow layers that are in this format already")
    job = parser.add_argument_group("the job")
    job.add_argument(
        "--device", type=_device, metavar="D", help="cpu, cuda:0, mps, ...; default: a GPU if there is one"
    )
    job.add_argument("--dry-run", action="store_true", help="only say what would be done, from the file's header")
    plots = parser.add_argument_group("figures, as PNG files")
    plots.add_argument("--plot", action="store_true", help="draw the error: all layers, and each of the worst ones")
    plots.add_argument("--plot_dir", metavar="DIR", help="where to; default: OUT's name with _plots")
    plots.add_argument("--plot_max_tensors", type=_whole, default=10, metavar="N", help="worst layers; default: 10")
    plots.add_argument("--plot_sample_size", type=_whole, default=6000, metavar="N", help="dots; default: 6000")
    _add_output_arguments(parser)
    return parser


def _inspect_parser() -> argparse.ArgumentParser:
    parser = _parser("inspect FILE [option ...]", "Look for every known fault of scaled FP8 files.")
    parser.add_argument("source", metavar="FILE")
    parser.add_argument("--deep", action="store_true", help="read all FP8 codes too, in search of NaN")
    parser.add_argument("--repair", metavar="OUT", help="write a repaired copy, as far as that goes without the source")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    _add_choice(parser, "--layout", LAYOUTS)
    _add_output_arguments(parser)
    return parser


def _compare_parser() -> argparse.ArgumentParser:
    parser = _parser("compare FILE [option ...]", "Try every rounding in both formats on the same layers.")
    parser.add_argument("source", metavar="FILE")
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="what Save FP8 Calibration wrote: adds calibrated rounding, and the error of the layers' outputs",
    )
    _add_layer_arguments(parser)
    _add_output_arguments(parser)
    return parser


PARSERS = {"quantize": _quantize_parser, "inspect": _inspect_parser, "compare": _compare_parser}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help lists what there is\n")


def _parser(usage: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    return _Parser(
        prog="python -m kernels",
        usage=f"python -m kernels {usage}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_layer_arguments(parser: argparse.ArgumentParser) -> None:
    scalings = parser.add_argument_group("scaling, one of").add_mutually_exclusive_group()
    _add_flags(scalings, "scaling", SCALINGS, SCALING_FLAGS, default="absmax")
    parser.add_argument("--seed", type=_whole, default=0, metavar="N", help="of the random draws; default: 0")
    layers = parser.add_argument_group("layers")
    _add_choice(layers, "--preset", LAYERS)
    layers.add_argument("--keep", nargs="+", default=(), metavar="P", help="patterns of layers that stay as they are")
    layers.add_argument("--only", nargs="+", default=(), metavar="P", help="patterns: quantize nothing else")
    layers.add_argument(
        "--keys_to_quantize_suffix",
        nargs="+",
        default=(".weight",),
        metavar="S",
        help="tensor names must end in one of these; default: .weight",
    )


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="write the result as JSON and nothing else")
    output.add_argument("--debug", action="store_true", help="trace every tensor, and errors in full")


def _add_flags(group, dest: str, table, flags, default: str) -> None:
    group.set_defaults(**{dest: default})
    for name, entry in table.items():
        note = " (default)" if name == default else ""
        flag = f"--{flags.get(name, name)}"
        group.add_argument(flag, action="store_const", dest=dest, const=name, help=entry.description + note)


def _add_choice(group, flag: str, table) -> None:
    default = next(iter(table))
    group.add_argument(
        flag, choices=table, default=default, metavar="X", help=f"{', '.join(table)}; default: {default}"
    )


def _whole(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


_whole.__name__ = "whole number"  # argparse names it in its message


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise argparse.ArgumentTypeError(f"there is no device {text!r} here: {str(error).splitlines()[0]}") from error
    return device
