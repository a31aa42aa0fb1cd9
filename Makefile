PYTHON = .build/venv/bin/python
TYPES = .build/types

.DEFAULT_GOAL = help
.PHONY: help test coverage hostile demo lint types format bench pictures locales clean environment

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

test: ## all tests, or some: make test PYTEST_ARGS="tests/unit -k seed"
	@bash tests/run.sh $(PYTEST_ARGS)

coverage: ## all tests, and the lines of kernels/ that they do not reach; takes a fifth longer
	@COVERAGE=1 bash tests/run.sh $(PYTEST_ARGS)

hostile: ## the whole suite of hostile files and killed jobs; `make test` runs a short one
	@HOSTILE=whole bash tests/run.sh tests/hostile $(PYTEST_ARGS)

demo: environment ## the example "Try it now" in a real ComfyUI: images before and after, sizes, PSNR
	@cd tests && ../$(PYTHON) -m tools.demo

lint: environment ## ruff, mypy, and where node is installed eslint and prettier
	@$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check .
	@$(MAKE) --no-print-directory types
	@$(PYTHON) -m pytest -q tests/js -k clean

# mypy needs the pack under a name that is a valid package name; the name of its folder is not.
types: environment ## mypy on kernels/ and nodes/
	@mkdir -p $(TYPES) && ln -sfn ../.. $(TYPES)/stochastic_fp8
	@cd $(TYPES) && ../venv/bin/python -m mypy --config-file stochastic_fp8/pyproject.toml --cache-dir ../mypy \
	    -p stochastic_fp8.kernels -p stochastic_fp8.nodes

format: environment ## let ruff fix and format the Python files
	@$(PYTHON) -m ruff check --fix . ; $(PYTHON) -m ruff format .

bench: environment ## speed, memory and quality, measured beside other programs
	@$(PYTHON) tests/benchmarks

pictures: environment ## redraw the images of the documentation, the example workflows, the icon and the banner
	@cd tests && ../$(PYTHON) -m tools.pictures

locales: environment ## bring the translations up to date with the texts of nodes and panels, list what to translate
	@cd tests && ../$(PYTHON) -m tools.locales

environment: ## build what all this needs under .build/
	@python3 tests/tools/environment.py

clean: ## delete .build/
	@rm -rf .build .coverage
