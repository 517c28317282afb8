# Everything a newcomer needs. Each target works as the first command after a clone.
.PHONY: help setup demo test bench train evaluate check format proto lock clean

help:  ## Show this list
	@grep -hE '^[a-z]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 10

setup: ## Make .venv with everything, development included
	@tools/setup.sh dev

demo:  ## Draw an avatar, add it as a tenant, let it speak: out/demo.mp4
	@tools/setup.sh tools
	@.venv/bin/lipsync demo

test:  ## Run all tests, those against the real Triton included
	@tools/setup.sh dev
	@tools/test-programs.sh
	.venv/bin/python -m pytest

bench: ## Measure the project: out/bench/report.md
	@tools/setup.sh bench
	@.venv/bin/lipsync bench all

train: ## Train the demo's models anew, for hours, and put them in place; run again, it goes on
	@tools/setup.sh training
	.venv/bin/python -m training speech
	.venv/bin/python -m training encoder out/trained --bfloat16
	.venv/bin/python -m training avatar out/trained --bfloat16
	cp out/trained/audio_encoder.onnx tools/lipsync/trained/audio_encoder.onnx
	cp out/trained/model_best.onnx tools/lipsync/trained/avatar.onnx

evaluate: ## Measure the demo's models through the whole service: tools/lipsync/trained/evaluation.png
	@tools/setup.sh training
	.venv/bin/python -m training evaluate

check: ## Lint, formatting, types
	@tools/setup.sh dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: ## Format the code
	@tools/setup.sh dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

proto: ## Generate code from the .proto files
	@tools/setup.sh dev
	.venv/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. compositor/proto/*.proto

lock:  ## Write requirements.lock anew from pyproject.toml
	@tools/setup.sh dev
	.venv/bin/pip install -q uv
	.venv/bin/uv pip compile -q --universal --no-annotate --python-version 3.10 --extra dev --upgrade \
		--custom-compile-command 'make lock' pyproject.toml -o requirements.lock

clean: ## Remove what the targets above made, training included; tenants stay
	rm -rf .venv .triton out .pytest_cache .mypy_cache .ruff_cache .hypothesis
