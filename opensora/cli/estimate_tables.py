"""How `opensora estimate` shows what it found."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from opensora.estimate.placement import Hardware
from opensora.estimate.sampling import SamplingEstimate
from opensora.estimate.training import BucketClip, BucketMemory, TrainingEstimate
from opensora.training.throughput import show_flops

GB = 10**9


def print_buckets(title: str, estimate: TrainingEstimate) -> int:
    """A row for each bucket."""
    hardware, weights = estimate.hardware, estimate.weights
    table = _table("bucket", "batch", "tokens", "activations", "memory", "fits", "largest batch", "work", "seconds")
    for row in estimate.buckets:
        table.add_row(row.clip.name, *_cells(row))
    console = _console()
    console.print(f"{title} on {_machine(hardware)}: for each GPU, with its batch", highlight=False)
    console.print(table)
    states = weights.total - weights.unsharded
    console.print(
        f"In each row: {_gb(states)} weights, gradients, optimizer and average (of {hardware.num_gpus} shards), "
        f"{_gb(weights.unsharded)} whole blocks, {_gb(estimate.encoders)} frozen encoders, {_gb(hardware.reserved)} "
        f"reserved.\nSequence parallel {estimate.degree} (ulysses x ring), gradient checkpointing "
        f"{estimate.checkpointing}. {_caution(hardware)}",
        highlight=False,
    )
    return 0


def print_settings(
    title: str, clip: BucketClip, estimates: Sequence[TrainingEstimate], *, enough: TrainingEstimate | None = None
) -> int:
    """A row for each way to train on one clip, and the one to take: the first that fits shares and recomputes least.

    enough: of more GPUs, where none fits.
    """
    hardware = estimates[0].hardware
    heads = ("ulysses x ring", "checkpointing", "batch", "tokens", "activations", "memory", "fits", "largest batch")
    table = _table(*heads, "work", "seconds")
    for estimate in estimates:
        (row,) = estimate.buckets
        table.add_row(str(estimate.degree), estimate.checkpointing, *_cells(row))
    console = _console()
    console.print(f"{title}, {clip.name}, on {_machine(hardware)}: for each GPU", highlight=False)
    console.print(table)
    fitting = next((estimate for estimate in estimates if estimate.buckets[0].fits), None)
    if fitting is None:
        least = min(estimates, key=lambda each: each.buckets[0].peak)
        console.print(
            f"Does not fit: {_gb(least.buckets[0].peak)} at least, with {least.degree} and {least.checkpointing}; more "
            "GPUs, a smaller clip, or --encoded where pixels are the most.",
            highlight=False,
        )
        if enough is not None:
            console.print(f"{_machine(enough.hardware)} fit it: {_options(enough)}", highlight=False)
    else:
        console.print(f"Fits: {_options(fitting)}", highlight=False)
    console.print(_caution(hardware), highlight=False)
    return 0


def print_stages(estimate: SamplingEstimate, *, fps: float) -> int:
    """A row for each stage of making a clip, and what else to know."""
    num_frames, height, width = estimate.size
    hardware = estimate.hardware
    table = _table("stage", "GPUs", "weights", "memory", "fits", "work", "seconds", "how", text=("stage", "how"))
    for stage in estimate.stages:
        numbers = (str(stage.num_gpus), _gb(stage.weights), _gb(stage.peak), "yes" if stage.fits else "no")
        work = (show_flops(stage.flops), _seconds(stage.seconds)) if stage.flops else ("-", "-")
        table.add_row(stage.name, *numbers, *work, stage.how)
    console = _console()
    clip = f"{num_frames} frames of {height} x {width}, {num_frames / fps:.3g} s at {fps:g} fps"
    console.print(f"{estimate.preset}: {clip}, on {_machine(hardware)}: for each GPU", highlight=False)
    console.print(table)
    longest = estimate.largest_frames
    lines = [
        "Fits." if estimate.fits else "Does not fit.",
        f"--offload: each model is on the GPU only while it works{'.' if estimate.offloads else ', not needed here.'}",
        f"Longest that fits at this size: {longest} frames, {longest / fps:.0f} s." if longest else "No clip fits.",
        *(f"Note: {note}." for note in estimate.notes),
        _caution(hardware),
    ]
    console.print("\n".join(lines), highlight=False)
    return 0


def _options(estimate: TrainingEstimate) -> str:
    degree = estimate.degree
    return (
        f"--parallel.ulysses {degree.ulysses} --parallel.ring {degree.ring} --run.grad-checkpoint "
        f"{estimate.checkpointing}"
    )


def _cells(row: BucketMemory) -> tuple[str, ...]:
    return (
        str(row.clip.batch),
        f"{row.num_tokens:,}",
        _gb(row.kept),
        _gb(row.peak),
        "yes" if row.fits else "no",
        str(row.largest_batch),
        show_flops(row.flops),
        _seconds(row.seconds),
    )


def _table(*heads: str, text: Sequence[str] = ("bucket", "ulysses x ring", "checkpointing")) -> Table:
    table = Table(box=None, pad_edge=False)
    for head in heads:
        table.add_column(head, justify="left" if head in text else "right", no_wrap=head != "how")
    return table


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=160)  # a file has no width to break lines at


def _machine(hardware: Hardware) -> str:
    return f"{hardware.num_gpus} x {_gb(hardware.memory)}"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / GB:.3g} GB" if num_bytes >= GB / 10 else f"{num_bytes / GB:.2g} GB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds < 1000 else f"{seconds:,.0f}"


def _caution(hardware: Hardware) -> str:
    return (
        f"An estimate: seconds are work, and what is computed again, at {hardware.mfu:.0%} of "
        f"{show_flops(hardware.flops)}/s, without waiting for data or other ranks."
    )
