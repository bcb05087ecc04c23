#!/usr/bin/env python3
"""Makes the committed test data: tiny checkpoints, tokenizers and GGUF files with what the reference programs
(Hugging Face transformers and tokenizers, the gguf package) compute from them.

    python -m venv venv && venv/bin/pip install -r tests/data/requirements.txt
    venv/bin/python tests/data/make_golden.py --out tests/data

Nothing is downloaded; every weight is seeded. Running it twice writes the same bytes (another CPU may round the last
bit of the logits differently). See README.md for what each folder holds.
"""

import argparse
import os
import sys
from pathlib import Path

# Before torch is imported: one thread, so that sums are always formed in the same order; no hub, no progress bars.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
sys.dont_write_bytecode = True

import torch  # noqa: E402
import transformers  # noqa: E402

from makers import gguf_files, models, reference, rope, tokenizers  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the folders are written")
    parser.add_argument("--import-reference", type=Path, metavar="DIR", help="compact these passages into reference/")
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()

    if options.import_reference:
        reference.compact(options.import_reference, options.out)
    print(tokenizers.make(options.out), flush=True)
    for spec in models.MODELS:
        print(models.make(spec, options.out), flush=True)
    print(gguf_files.make(options.out))
    print(rope.make(options.out))


if __name__ == "__main__":
    main()
