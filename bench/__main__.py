"""`python -m bench COMMAND`: what things cost here; `--help` after a command says more.

python -m bench rms_norm               an operator, or all, on every backend, beside what could be used instead
python -m bench all --quick            all operators at small sizes, in minutes
python -m bench model --quick          whole decodes, encodes, denoising and training steps of a model
python -m bench traffic                bytes and launches of every model's blocks, with no device
python -m bench exactness              how far tiled, streamed and patched decodes are from the model's own
python -m bench frames                 peak memory against the number of frames, and what the planner predicts
python -m bench memory                 decoders' peaks at real widths and sizes, on tensors without data
python -m bench convolution            the library's own conv3d, which a kernel of ours must beat
python -m bench tune causal_conv3d     faster constants for this GPU's table
python -m bench page                   the tables of bench/results/ and of README.md from the JSON there
python -m bench plot FILE DIR          pictures of what another run wrote with --json
python -m bench gpu --output out/      all of it, and the tests, on a machine with a GPU, in nine minutes
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench import convolution, exactness, frames, gpu, model, on_paper, operators, page, record, traffic, tune
from opensora_kernels import backends

COMMANDS = {
    "convolution": convolution.main,
    "exactness": exactness.main,
    "frames": frames.main,
    "gpu": gpu.main,
    "memory": on_paper.main,
    "model": model.main,
    "page": page.main,
    "plot": record.main,
    "traffic": traffic.main,
    "tune": tune.main,
}


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] in ([], ["--help"], ["-h"]):
        print(__doc__)
        return 0
    if arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    if not arguments[0].startswith("-") and arguments[0] not in [*backends.ops(), "all"]:
        known = f"a command ({', '.join(COMMANDS)}), an operator ({', '.join(backends.ops())}) or all"
        print(f"bench: the first argument must be {known}, got {arguments[0]!r}", file=sys.stderr)
        return 2
    return operators.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
