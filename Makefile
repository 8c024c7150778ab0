# One command each; CONTRIBUTING.md says when.
BIN := .venv/bin

.PHONY: check test test-all docs soak

check:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test:
	$(BIN)/pytest

docs:
	$(BIN)/pytest -n 0 tests/unit/test_readme.py tests/unit/test_extras.py tests/unit/test_deployment.py

soak:
	$(BIN)/python -m benchmarks.chaos --minutes 60 --seed $$(date +%s)
	$(BIN)/python -m benchmarks.faults
