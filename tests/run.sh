#!/usr/bin/env bash
# Builds what the tests need, then runs them; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

python3 tests/environment.py ${BROWSER:+--browser}
export COVERAGE_FILE=.build/coverage
exec .build/venv/bin/python -m pytest tests "${@}"
