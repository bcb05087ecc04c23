# make         builds the library (target/release) and the tools (build/)
# make demo    sets everything up and answers a question about a long document with the real model
# make test    sets everything up and runs every test
# make check   formatting and lints
# make kernels-check   compiles the CUDA kernels and compares them with the committed PTX; `make kernels` writes it

CARGO ?= cargo
MODEL := .cache/SmolLM2-135M-Instruct.Q4_1.gguf
JOBS ?= $(shell nproc)

.PHONY: all setup model library tools demo test check kernels kernels-check clean

all: tools

setup:
	@tools/setup.sh

model: setup
	@tools/fetch_model.sh

library: setup
	$(CARGO) build --release --locked

tools: library
	cmake -S bindings/cpp -B build/cpp -DCMAKE_BUILD_TYPE=Release -DKVAHEAD_LIBRARY_DIR=$(CURDIR)/target/release
	cmake --build build/cpp -j $(JOBS)

demo: tools model
	@tools/demo.sh

test: tools model
	$(CARGO) test --release --locked --workspace
	CARGO=$(CARGO) tests/emulator/run.sh
	cmake -S tests -B build/tests -DCMAKE_BUILD_TYPE=Release -DKVAHEAD_LIBRARY_DIR=$(CURDIR)/target/release -DKVAHEAD_TOOLS_DIR=$(CURDIR)/build/cpp
	cmake --build build/tests -j $(JOBS)
	ctest --test-dir build/tests --output-on-failure -j $(JOBS)

check: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --locked --workspace --all-targets -- -D warnings

kernels: setup
	@tools/kernels/compile.py

kernels-check: setup
	@tools/kernels/compile.py --check

clean:
	$(CARGO) clean
	rm -rf build
