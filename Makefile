# make demo       set everything up and train on handwritten digits, on this machine
# make test       set everything up and pass the tests, on a real SLURM cluster of one machine where possible
# make test-all   the same with the long repetitions and the whole matrix of endings, and the coverage of each room
#                 (and the package chromium, where it can); JOBS=4: in so many processes; the tests of a cluster mostly wait
# make soak       half an hour of preemptions, kills, cancels and lost nodes on a real SLURM cluster of this machine:
#                 every run must end as it should, equal to one that nothing disturbed; SECONDS=120 SEED=7

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
SECONDS ?= 1800
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all soak slurm chromium lint clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	clipcluster shards convert digits --out data/digits
	clipcluster submit recipes/digits.yaml --executor local --follow
	clipcluster report "$$(ls -dt "$${CLIPCLUSTER_RUNS:-runs}"/digits-???????? | head -n 1)" --out report.html

slurm:
	@tests/install-slurm

chromium:
	@tests/install-chromium

lint: $(INSTALLED)
	ruff check .
	ruff format --check .
	mypy
	lint-imports

test: $(INSTALLED) slurm
	python -m pytest -m "not long" -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-all: $(INSTALLED) slurm chromium
	python -m pytest --hypothesis-profile searching -n $(JOBS) --dist loadfile --no-loadscope-reorder --cov --cov-report=

soak: $(INSTALLED) slurm
	python -m tests.soak --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage .coverage.*
