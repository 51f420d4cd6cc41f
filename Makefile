.DEFAULT_GOAL := help
PYTHON ?= python

.PHONY: help install test style types check run board

help:  ## Show what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | column -t -s ':'

install:  ## Install the package with all that development needs
	$(PYTHON) -m pip install -e '.[dev,bench]'

test:  ## Run the tests
	$(PYTHON) -m pytest -n 2 --dist loadfile

style:  ## Format and lint
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

types:  ## Check the types
	$(PYTHON) -m mypy

check:  ## What CI runs, in an environment of its own
	bash .ci/run

run:  ## Run the embedded job
	$(PYTHON) -m snell_lightning fit --config vit.yaml

board:  ## Watch runs in TensorBoard
	tensorboard --logdir runs
