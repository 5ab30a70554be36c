# Work from a virtual environment: python3 -m venv .venv && . .venv/bin/activate

.PHONY: setup check test bench

setup:
	pip install --quiet --editable '.[test]'

check:
	ruff format --check .
	ruff check .
	mypy
	lint-imports
	pytest -q tests/test_house.py

test:
	pytest -n 2

bench:
	@for bench in $$(ls benchmarks/*.py); do echo "== $$bench"; python "$$bench" || exit 1; done
