"""The command `opensora`: the only place where arguments, environment variables and the terminal are read.

Exit status: 0 done; 2 for input that cannot be used, after one line that says what; 130 after Ctrl-C; 143 after
SIGTERM.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

COMMANDS = {
    "sample": ("opensora.cli.sample", "make images and videos from text"),
    "reconstruct": ("opensora.cli.reconstruct", "encode and decode a video, and measure what is lost"),
    "encode": ("opensora.cli.encode", "encode clips and captions once, before a training"),
    "find-batch-sizes": ("opensora.cli.find_batch_sizes", "measure which batch of each bucket takes equally long"),
    "train": ("opensora.cli.train", "train a diffusion transformer"),
    "train-vae": ("opensora.cli.train_vae", "train a video VAE"),
    "train-all": ("opensora.cli.train_all", "train every stage of every preset, scaled down"),
    "estimate": ("opensora.cli.estimate", "say what training and sampling take, before anything runs"),
    "inspect": ("opensora.cli.inspect", "say what a checkpoint is, without reading its weights"),
    "convert": ("opensora.cli.convert", "write a checkpoint in another layout, or adapt it to the next model"),
    "pack": ("opensora.cli.pack", "make a small model folder of finished training runs"),
    "make-tiny-data": ("opensora.cli.make_tiny_data", "write the clips on which the embedded model was trained"),
}
INTERRUPTED = 130


class CommandError(ValueError):
    """Input that a command cannot use; the text is the line that the user sees."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `opensora ARGUMENTS` (default: the process's own) and return the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        from opensora_kernels import __version__

        print(__version__)
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        return _fail("opensora", f"unknown command {name!r}; commands: {', '.join(COMMANDS)}")
    try:
        with _cleaning_up():
            return importlib.import_module(COMMANDS[name][0]).run(arguments[1:])
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"opensora {name}: stopped{''.join(f'; {text}' for text in interrupt.args)}", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("OPENSORA_TRACEBACK"):
            raise
        return _fail(f"opensora {name}", str(error) or type(error).__name__)
    except RuntimeError as error:
        if os.environ.get("OPENSORA_TRACEBACK") or not _is_about_the_machine(error):
            raise
        return _fail(f"opensora {name}", str(error))


@contextmanager
def _cleaning_up() -> Iterator[None]:
    """Meanwhile SIGTERM ends the process as an exception does, so that temporary files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _is_about_the_machine(error: RuntimeError) -> bool:
    """Too little memory, or a backend that was asked for and cannot run here; other RuntimeErrors are our mistakes."""
    import torch

    from opensora_kernels import BackendError

    return isinstance(error, (torch.OutOfMemoryError, BackendError))


def _fail(program: str, message: str) -> int:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # ranks may fail for different reasons
        program += f" (rank {os.environ.get('RANK')})"
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _usage() -> str:
    lines = ["usage: opensora COMMAND [--help] ...", "", "commands:"]
    lines += [f"  {name:<18}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([*lines, "", "OPENSORA_TRACEBACK=1 shows where an error came from."])
