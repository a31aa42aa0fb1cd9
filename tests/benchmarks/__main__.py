"""`make bench`: speed, memory and quality, compared with other programs in the same run.

python tests/benchmarks             # tensors on the CPU, and whole files of up to 1.5 GB
python tests/benchmarks --cpu       # only these sections; also --files, --patterns, --calibration, --encoder, --memory,
                                    # --choices, --fit
python tests/benchmarks --big       # files of 10 and 12 GB
python tests/benchmarks --save      # also into RESULTS.md
"""

import argparse
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import choices_rows  # noqa: E402
import conftest  # noqa: E402, F401  (loads the pack)
import cpu_rows  # noqa: E402
import encoder_rows  # noqa: E402
import file_rows  # noqa: E402
import fit_rows  # noqa: E402
import memory_rows  # noqa: E402
import pattern_rows  # noqa: E402
import quality_rows  # noqa: E402
from measure import machine, say, table  # noqa: E402

RESULTS = HERE / "RESULTS.md"
SECTIONS = {
    "cpu": ("Tensors on the CPU, start and figures", cpu_rows.rows),
    "files": ("Files", file_rows.rows),
    "patterns": ("Patterns made to be slow", pattern_rows.rows),
    "calibration": ("Calibrated rounding", quality_rows.rows),
    "encoder": ("Calibrated rounding of a text encoder", encoder_rows.rows),
    "memory": ("Main memory of calibrating", memory_rows.rows),
    "choices": ("What each choice costs", choices_rows.rows),
    "fit": ("Fit my memory: layers measured", fit_rows.rows),
    "big": ("Big files", file_rows.big_rows),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (title, _) in SECTIONS.items():
        parser.add_argument(f"--{name}", action="store_true", help=title)
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        metavar="N",
        help="rounds; the best one counts, for whole files the median; default: 5",
    )
    parser.add_argument("--save", action="store_true", help=f"write the sections into {RESULTS.name}")
    options = parser.parse_args()
    chosen = [name for name in SECTIONS if getattr(options, name)] or ["cpu", "files", "patterns", "calibration"]
    conditions = machine()
    print(conditions)
    for name in chosen:
        title, rows = SECTIONS[name]
        print(f"\n{title}\n", flush=True)
        text = table(map(say, rows(options.rounds)))
        print(text, flush=True)
        if options.save:
            save(name, f"## {title}\n\n{conditions}\n\n{text}")


def save(name, text):
    """Replace a section in RESULTS.md between its markers; the other sections stay."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    section = f"{begin}\n{text}\n{end}\n"
    whole = RESULTS.read_text() if RESULTS.exists() else "# Benchmark results\n"
    found = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}\n", re.DOTALL)
    if found.search(whole):
        whole = found.sub(lambda _: section, whole)
    else:
        whole = f"{whole.rstrip()}\n\n{section}"
    RESULTS.write_text(whole)


if __name__ == "__main__":
    main()
