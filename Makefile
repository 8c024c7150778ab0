# One command each; CONTRIBUTING.md says when.
BIN := .venv/bin

.PHONY: check test test-rest test-all coverage docs soak

check:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test:
	$(BIN)/pytest

# The rest: servers, clusters, browsers, processes that are killed, chaos with a fixed seed. Many
# wait more than they compute, hence a process more than there are processors.
REST := server or process or cluster or browser or chaos or slow
test-rest:
	$(BIN)/pytest -n 3 --databases=all -m "$(REST)"

test-all: test test-rest

# Lines and branches of hpo that any test runs, processes that tests start included.
coverage:
	$(BIN)/pytest --databases=all -m "" --cov --cov-report=term

# What the pages say is true; then the site, in build/docs.
docs:
	$(BIN)/pytest -n 0 -m "" tests/unit/test_readme.py tests/unit/test_extras.py tests/unit/test_api.py \
		tests/integration/test_deployment.py
	$(BIN)/mkdocs build --strict

soak:
	$(BIN)/python -m benchmarks.chaos --minutes 60 --seed $$(date +%s)
	$(BIN)/python -m benchmarks.faults
