# make demo: train both stages on real digits and sample; make demo-text: the same from captions; make test: ruff and
# pytest, on the CPU also where there is a GPU (the kernels on it: bash runs/benchmark.sh check). Each sets itself up in
# .venv.
PYTHON ?= python3

demo: .venv/demo-ready
	PYTHON=.venv/bin/python bash runs/demo.sh

demo-text: .venv/demo-ready
	PYTHON=.venv/bin/python bash runs/demo_text.sh

test: .venv/test-ready
	.venv/bin/ruff check .
	CUDA_VISIBLE_DEVICES= .venv/bin/python -m pytest -n 2

.venv/demo-ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14) and "Python 3.11 to 3.14 is needed, this is %s: make PYTHON=python3.12" % sys.version.split()[0])'
	$(PYTHON) -m venv .venv || (rm -rf .venv; echo "Python has no venv module: on Debian and Ubuntu, apt install python3-venv"; exit 1)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test-ready: .venv/demo-ready requirements-dev.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.PHONY: demo demo-text test
