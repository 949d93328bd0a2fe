# Two commands matter: `make run` serves, `make test` builds and passes the tests.

VENV   := .venv
PYTHON := $(VENV)/bin/python
# All that is compiled, or may be
SOURCE := $(wildcard fastsmtp/*.py* fastsmtp/*/*.py) setup.py pyproject.toml

.PHONY: run test bench bench-compare asan fuzz clean

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
# Three processes, because tests wait more than they work; the longest files begin (tests/conftest.py).
test: $(VENV)/tested
	tests/install-programs
	$(PYTHON) -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(VENV)/benched
	$(PYTHON) -m pytest bench -o python_files='bench_*.py' -o python_functions='bench_*' --benchmark-only \
		--benchmark-sort=name --benchmark-columns=median,iqr,ops,rounds $(ARGS)

# What a change costs: make bench-compare BASE=main~3
bench-compare: $(VENV)/benched
	$(PYTHON) -m bench.compare $(BASE) $(ARGS)

# The C modules with AddressSanitizer and UBSan, in a tree of their own; needs clang.
SANITIZERS := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined,fuzzer-no-link -fno-sanitize-recover=undefined

build/sanitized/built: $(wildcard fastsmtp/*.p*) setup.py $(VENV)/tested
	$(PYTHON) -m pip install --quiet --disable-pip-version-check atheris
	CC=clang LDSHARED='clang -shared' FASTSMTP_PURE=1 FASTSMTP_CFLAGS='$(SANITIZERS)' \
		$(PYTHON) setup.py --quiet build --build-base build/sanitized --build-lib build/sanitized/lib
	touch $@

asan: build/sanitized/built
	fuzz/sanitized -m pytest -p no:cacheprovider tests/test_parser.py tests/test_files.py tests/test_shared.py $(ARGS)

fuzz: build/sanitized/built
	fuzz/sanitized fuzz/fuzz_parser.py -max_total_time=$(or $(SECONDS),60)
	fuzz/sanitized fuzz/fuzz_session.py -max_total_time=$(or $(SECONDS),60)

clean:
	rm -rf $(VENV) build *.egg-info *.so fastsmtp/*.so fastsmtp/*/*.so fastsmtp/_parser.c fastsmtp/_files.c fastsmtp/_shared.c
