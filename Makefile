PYTHON = .build/venv/bin/python
ENVIRONMENT = python3 tests/environment.py

.PHONY: demo test bench lint format pictures clean environment

test: ## the whole test suite, or a part: make test PYTEST_ARGS="tests/unit -k seed"
	@bash tests/run.sh $(PYTEST_ARGS)

demo: environment ## the example Try it now in a real ComfyUI: pictures before and after, sizes, PSNR
	@$(PYTHON) tests/demo.py

bench: environment
	@$(PYTHON) tests/benchmarks

pictures: environment ## the images of the documentation and of the example workflows
	@$(PYTHON) tests/pictures.py

lint: environment
	@$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check . && $(PYTHON) -m pytest -q tests/js -k clean

format: environment
	@$(PYTHON) -m ruff check --fix . ; $(PYTHON) -m ruff format .

clean:
	@rm -rf .build .coverage

environment:
	@$(ENVIRONMENT)
