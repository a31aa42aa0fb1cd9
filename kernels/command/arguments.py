"""The command line. All choices come from the library's tables, so the two cannot differ."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch

from ..numerics.formats import FORMATS
from ..numerics.rounding import METHODS
from ..numerics.scaling import SCALINGS
from ..recipe import CHOICES, Recipe
from ..selection.selection import LAYERS, PRESET_LAYERS
from ..version import VERSION

FP8_TYPES = {name.removeprefix("float8_").removesuffix("fn"): name for name in FORMATS}
"""Value of --fp8_type -> format."""

ROUNDING_FLAGS = {"complex_neighbor": "complex_rounding", "shift_perturb": "shifturb"}
"""Rounding -> its flag, where the names differ."""

SCALING_FLAGS = {"none": "no-scale"}

COMMANDS = """\
other commands:
  python -m kernels inspect FILE   check a scaled FP8 file: problems, and how each ComfyUI version reads it
  python -m kernels compare FILE   try every rounding in both formats on the layers of a file

exit codes:
  0    success
  1    a file cannot be read, used or written; inspect: problems found
  2    wrong command line
  130  cancelled with Ctrl+C
"""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The parsed arguments; `command` is a key of PARSERS. Raises SystemExit(2) for wrong arguments, (0) for --help."""
    name = arguments[0] if arguments and arguments[0] in ("inspect", "compare") else "quantize"
    parser, rest = PARSERS[name](), arguments if name == "quantize" else arguments[1:]
    options = parser.parse_args(rest)
    if name == "quantize" and options.dry_run and options.plot:
        parser.error("--plot and --dry-run exclude each other: a dry run has no errors to draw")
    options.command = name
    return options


def recipe(options: argparse.Namespace) -> Recipe:
    """The recipe of a quantize command."""
    return replace(
        layer_recipe(options),
        format=FP8_TYPES[options.fp8_type],
        rounding=options.rounding,
        layout=options.layout,
        matmul=options.matmul,
        nonfinite=options.nonfinite,
    )


def layer_recipe(options: argparse.Namespace) -> Recipe:
    """The scaling, the seed and the choice of layers, which every command that quantizes has."""
    return Recipe(
        scaling=options.scaling,
        seed=options.seed,
        layers=options.preset,
        keep=options.keep,
        only=options.only,
        suffixes=options.keys_to_quantize_suffix,
        size_limit=options.size_limit,
        target_quality=options.target_db,
    )


def _quantize_parser() -> argparse.ArgumentParser:
    parser = _parser("IN OUT [option ...]", "Quantize a .safetensors model to scaled FP8 for ComfyUI.", epilog=COMMANDS)
    parser.add_argument("--version", action="version", version=VERSION)
    parser.add_argument(
        "source", metavar="IN", help="a .safetensors or .sft file, or the .safetensors.index.json of several"
    )
    parser.add_argument("target", metavar="OUT", help="the .safetensors file to write")
    parser.add_argument("--fp8_type", choices=FP8_TYPES, default="e4m3", help="FP8 format; default: e4m3")
    roundings = parser.add_argument_group("rounding (choose one)").add_mutually_exclusive_group()
    _add_flags(roundings, "rounding", METHODS, ROUNDING_FLAGS, default="stochastic")
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="a file from Save Calibration; for --calibrated, --preset measured and the input scales of --matmul fp8",
    )
    _add_limits(_add_layer_arguments(parser, LAYERS))
    file = parser.add_argument_group("output file")
    _add_choice(file, "--layout", "layout", "layout of OUT: ")
    _add_choice(file, "--matmul", "matmul", "how ComfyUI multiplies: ")
    _add_choice(file, "--nonfinite", "nonfinite", "weights with NaN or infinite values: ")
    file.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    file.add_argument("--requantize", action="store_true", help="allow layers that already have this format")
    job = parser.add_argument_group("run")
    job.add_argument(
        "--device",
        type=_device,
        metavar="D",
        help="cpu, cuda:0, mps, ...; default: a CUDA GPU if available",
    )
    job.add_argument("--dry-run", action="store_true", help="show what would be done, and write nothing")
    plots = parser.add_argument_group("figures (PNG)")
    plots.add_argument("--plot", action="store_true", help="draw the errors of all layers and of the worst layers")
    plots.add_argument("--plot_dir", metavar="DIR", help="folder; default: OUT with _plots for .safetensors")
    plots.add_argument("--plot_max_tensors", type=_whole, default=10, metavar="N", help="worst layers; default: 10")
    plots.add_argument(
        "--plot_sample_size",
        type=_whole,
        default=6000,
        metavar="N",
        help="dots; default: 6000",
    )
    _add_output_arguments(parser)
    return parser


def _inspect_parser() -> argparse.ArgumentParser:
    parser = _parser("inspect FILE [option ...]", "Check a scaled FP8 file for every known problem.")
    parser.add_argument("source", metavar="FILE", help="the .safetensors file to check")
    parser.add_argument("--deep", action="store_true", help="also read all weights, to find NaN")
    parser.add_argument(
        "--repair", metavar="OUT", help="write a repaired copy, as far as possible without the 16-bit model"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    _add_choice(parser, "--layout", "layout", "layout of the copy: ")
    _add_output_arguments(parser)
    return parser


def _compare_parser() -> argparse.ArgumentParser:
    parser = _parser("compare FILE [option ...]", "Try every rounding in both formats on the layers of a file.")
    parser.add_argument("source", metavar="FILE", help="the .safetensors file to read")
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="a file from Save Calibration; adds calibrated rounding and the error of the layer outputs",
    )
    _add_layer_arguments(parser, PRESET_LAYERS)
    parser.set_defaults(size_limit=0.0, target_db=0.0)
    _add_output_arguments(parser)
    return parser


PARSERS = {"quantize": _quantize_parser, "inspect": _inspect_parser, "compare": _compare_parser}


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _parser(usage: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    return _Parser(
        prog="python -m kernels",
        usage=f"python -m kernels {usage}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_layer_arguments(parser: argparse.ArgumentParser, presets: Mapping[str, object]) -> argparse._ArgumentGroup:
    scalings = parser.add_argument_group("scaling (choose one)").add_mutually_exclusive_group()
    _add_flags(scalings, "scaling", SCALINGS, SCALING_FLAGS, default="absmax")
    parser.add_argument("--seed", type=_whole, default=0, metavar="N", help="seed of the random numbers; default: 0")
    layers = parser.add_argument_group("layers")
    _add_choice(layers, "--preset", "layers", "which layers: ", presets)
    layers.add_argument("--keep", nargs="+", default=(), metavar="P", help="patterns of layers to leave unchanged")
    layers.add_argument("--only", nargs="+", default=(), metavar="P", help="patterns of the only layers to quantize")
    layers.add_argument(
        "--keys_to_quantize_suffix",
        nargs="+",
        default=(".weight",),
        metavar="S",
        help="quantize only tensors whose names end in one of these; default: .weight",
    )
    return layers


def _add_limits(layers: argparse._ArgumentGroup) -> None:
    layers.add_argument(
        "--size-limit",
        type=_limit,
        default=0.0,
        metavar="GB",
        help="for --preset measured: the largest size of OUT, in GB of 10^9 bytes",
    )
    layers.add_argument(
        "--target-db",
        type=_limit,
        default=0.0,
        metavar="DB",
        help="for --preset measured: the smallest predicted quality of the latent image, in dB",
    )


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print the result as JSON only")
    output.add_argument("--debug", action="store_true", help="log how each tensor is rounded; show full tracebacks")


def _add_flags(
    group: argparse._ActionsContainer, dest: str, table: Mapping[str, Any], flags: Mapping[str, str], default: str
) -> None:
    """One flag per entry of a table, named after it unless `flags` says otherwise."""
    group.set_defaults(**{dest: default})
    for name, entry in table.items():
        note = " (default)" if name == default else ""
        flag = f"--{flags.get(name, name)}"
        group.add_argument(flag, action="store_const", dest=dest, const=name, help=entry.description + note)


def _add_choice(
    group: argparse._ActionsContainer, flag: str, field: str, what: str, choices: Mapping[str, object] | None = None
) -> None:
    """An option for a field of the recipe. choices: some of its table. The first choice is the default."""
    table = choices or CHOICES[field]
    default = next(iter(table))
    group.add_argument(
        flag, choices=table, default=default, metavar="X", help=f"{what}{', '.join(table)}; default: {default}"
    )


def _whole(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def _limit(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 up")
    return number


_limit.__name__ = "number"
_whole.__name__ = "whole number"  # argparse shows it in its message


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise argparse.ArgumentTypeError(f"device {text!r} is not available: {str(error).splitlines()[0]}") from error
    return device
