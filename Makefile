# Two commands matter: `make run` serves, `make test` builds and passes the tests.

VENV   := .venv
PYTHON := $(VENV)/bin/python
# All that is compiled, or may be
SOURCE := $(wildcard fastsmtp/*.py* fastsmtp/*/*.py) setup.py pyproject.toml

.PHONY: run test bench bench-compare fuzz clean

# Builds in place, so that the source tree is what runs.
install = test -x $(PYTHON) || python3 -m venv $(VENV); \
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --upgrade pip && \
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable

$(VENV)/built: $(SOURCE)
	$(install) .
	touch $@

$(VENV)/tested: $(SOURCE)
	$(install) '.[test,loadtest]'
	touch $(VENV)/built $@

$(VENV)/benched: $(SOURCE)
	$(install) '.[test,loadtest,bench]'
	touch $(VENV)/built $(VENV)/tested $@

run: $(VENV)/built
	$(PYTHON) -m fastsmtp serve

# Programs that some tests run are installed where that is allowed (Debian, root); elsewhere those tests are skipped.
# Three processes, because tests wait more than they work.
test: $(VENV)/tested
	tests/install-programs
	$(PYTHON) -m pytest -n 3 --dist loadfile $(ARGS)

bench: $(VENV)/benched
	$(PYTHON) -m pytest bench -o python_files='bench_*.py' -o python_functions='bench_*' --benchmark-only \
		--benchmark-sort=name --benchmark-columns=median,iqr,ops,rounds $(ARGS)

# What a change costs: make bench-compare BASE=main~3
bench-compare: $(VENV)/benched
	$(PYTHON) -m bench.compare $(BASE) $(ARGS)

fuzz: $(VENV)/tested
	$(PYTHON) -m pip install --quiet --disable-pip-version-check atheris
	$(PYTHON) fuzz/fuzz_parser.py -max_total_time=$(or $(SECONDS),60)
	$(PYTHON) fuzz/fuzz_session.py -max_total_time=$(or $(SECONDS),60)

clean:
	rm -rf $(VENV) build *.egg-info *.so fastsmtp/*.so fastsmtp/*/*.so fastsmtp/_parser.c fastsmtp/_files.c fastsmtp/_shared.c
