# make demo          train a T2T-ViT on the embedded digits with two processes, validate it, and draw its curves
# make tensorboard   show the demo's run, and others beside it, in the browser at http://127.0.0.1:6006 (PORT=…)
# make test          run make lint and all tests but the slow ones; make test-slow and make test-faults run the others
# make lint          run the linter, and the type checker over all code but the tests: half a minute, later seconds
# make browser       install Chromium for the tests of pages, which are skipped without it (Debian and Ubuntu)
# make clean         remove the environment and the demo's output
#
# VENV=… names another place for the environment; JOBS=… runs that many tests at a time, each with one thread.
VENV ?= .venv
JOBS ?= 2
PYTHON ?= python3
ABSOLUTE_VENV := $(abspath $(VENV))
RUN := $(ABSOLUTE_VENV)/bin/python
DEMO := output/train/demo
PORT ?= 6006
TEST = OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist worksteal

.PHONY: demo tensorboard test test-slow test-faults browser lint clean

demo: $(ABSOLUTE_VENV)/.installed
	rm -rf $(DEMO)
	PYTHON=$(RUN) ./distributed_train.sh 2 -c configs/demo.yaml --experiment demo
	$(RUN) validate.py --dataset digits --checkpoint $(DEMO)/model_best.pth.tar --results-file $(DEMO)/validation
	@echo 'The curves are in $(DEMO)/curves.png'

tensorboard: $(ABSOLUTE_VENV)/.installed
	@ls $(dir $(DEMO))*/metrics.jsonl > /dev/null 2>&1 || \
		{ echo '$(DEMO): there is no run yet; make demo comes first' >&2; exit 2; }
	$(RUN) -m tensorboard.main --logdir $(dir $(DEMO)) --host 127.0.0.1 --port $(PORT)

test: $(ABSOLUTE_VENV)/.installed-dev lint
	$(TEST) -m 'not slow and not faults'

test-slow: $(ABSOLUTE_VENV)/.installed-dev
	$(RUN) -m pytest -m slow

test-faults: $(ABSOLUTE_VENV)/.installed-dev
	T2T_FIGURES=output/faults.json $(TEST) tests/faults

browser:
	command -v $${CHROMIUM:-chromium} || { \
		sudo=$$(test "$$(id -u)" = 0 || echo sudo); \
		$$sudo apt-get update -q && $$sudo apt-get install -q -y --no-install-recommends chromium; }

lint: $(ABSOLUTE_VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m mypy

# A file marks an installation; it is newer than its requirements.
$(ABSOLUTE_VENV)/.installed: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv $(ABSOLUTE_VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(ABSOLUTE_VENV)/.installed-dev: requirements-dev.txt $(ABSOLUTE_VENV)/.installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(ABSOLUTE_VENV) $(DEMO)
