# Every target sets up what it needs by itself; nothing has to be installed beforehand but Debian 12.
.DEFAULT_GOAL := help
.PHONY: help demo test check bench test-long clean venv lock

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## Start the daemon, run nginx and redis, and nginx behind all three walls side by side
	@tools/demo.sh

test: ## Check the code, then run the unit, conformance, style, integration and fault tests
	@tools/test.sh

check: ## Lint, format, types, import rules and shell scripts
	@tools/setup.sh test
	@tools/check.sh

bench: ## Measure beside crun, docker and others, and print the ratios
	@tools/setup.sh bench
	@.venv/bin/python -m pytest tests/perf --timeout 0 --capture no --quiet

test-long: ## The slow tests: random kills, many seeds
	@tools/setup.sh test
	@.venv/bin/python -m pytest tests -m slow --timeout 7200

clean: ## Remove the demo with its instances, the virtual environment and caches
	@tools/demo.sh clean
	@rm -rf .venv .cache build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

venv: ## Install the Debian packages and the virtual environment, and nothing else
	@tools/setup.sh test

lock: ## Pin the Python dependencies anew: requirements/*.txt
	@tools/lock.sh
