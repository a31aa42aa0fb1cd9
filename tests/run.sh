#!/usr/bin/env bash
# Builds what the tests need, then runs them. Arguments replace the whole suite:
#   tests/run.sh tests/unit -k seed
# COVERAGE=1 measures what they cover of kernels/, which takes a fifth longer.
# Installs a browser if there is none.
set -euo pipefail
cd "$(dirname "$0")/.."

python3 tests/tools/environment.py --browser

export COVERAGE_FILE=.build/coverage
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the two test processes share the cores
if [ "$#" -eq 0 ]; then
    set -- tests
fi
if [ -n "${COVERAGE:-}" ]; then
    set -- --cov --cov-config=pyproject.toml --cov-report=term "$@"
fi
exec .build/venv/bin/python -m pytest -n 2 "$@"
