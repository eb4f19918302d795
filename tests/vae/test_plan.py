"""Plans: what is chosen, how it explains itself, and that the memory it predicts is what a fresh process measures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

import pytest
import torch
from torch import Tensor

from opensora_kernels import causal_conv3d, cpu_steps
from opensora_kernels.vae import Streaming, Tiled, TilePlan, Tiling, Whole, decode, gather, plan_tiles
from opensora_kernels.vae.memory import Ledger, Prediction
from opensora_kernels.vae.plan import parse_bytes
from opensora_kernels.vae.tiled_strategy import tilings_for
from tests.vae.memory import Case, is_met, measure_afresh
from tests.vae.models import DECODERS, build

SHAPE = (1, 4, 5, 64, 64)  # planning computes nothing: its time does not depend on height and width


def test_a_large_budget_runs_the_clip_whole_and_a_small_one_streams_it():
    model = build(DECODERS["wan"])
    whole = plan_tiles(model, SHAPE, "1GiB", torch.float32)
    assert isinstance(whole.strategy, Whole)
    small = plan_tiles(model, SHAPE, whole.peak_bytes - 1, torch.float32)
    assert isinstance(small.strategy, Streaming)
    assert small.peak_bytes < whole.peak_bytes
    assert whole.relative_time == 1


@torch.no_grad()
def test_decode_keeps_to_a_budget_and_gives_the_same_frames():
    model = build(DECODERS["wan"])
    z = torch.randn(2, 4, 5, 32, 24, generator=torch.Generator().manual_seed(0))
    budget = int(0.7 * plan_tiles(model, tuple(z.shape), "1GiB", torch.float32).peak_bytes)
    chunks = list(decode(model, z, memory_budget=budget))
    assert len(chunks) > 1
    assert torch.equal(gather(chunks), model(z))


def test_a_plan_explains_itself():
    model = build(DECODERS["open_sora"])
    budget = int(0.7 * plan_tiles(model, SHAPE, "1GiB", torch.float32).peak_bytes)
    shown = str(plan_tiles(model, SHAPE, budget, torch.float32))
    assert shown.startswith("streaming: ")
    for part in ("memory: ", "of a run over all frames at once", "passed over: whole", "a norm looks at all frames"):
        assert part in shown


@dataclass(frozen=True)
class Rough:
    """A third strategy, as tiling is: fast, small, and not exact."""

    is_exact = False

    def run(self, model: object, x: Tensor) -> Iterator[Tensor]:
        yield model(x)

    def predict(self, model: object, shape: object, dtype: object, device: object) -> Prediction:
        return Prediction(1000, 0, 1.0)


def test_exact_plans_go_before_faster_ones():
    model = build(DECODERS["wan"])
    candidates = [Rough(), Whole(), Streaming(1)]
    assert not isinstance(plan_tiles(model, SHAPE, "1GiB", torch.float32, strategies=candidates).strategy, Rough)
    assert isinstance(plan_tiles(model, SHAPE, 2000, torch.float32, strategies=candidates).strategy, Rough)


def test_tiles_come_where_nothing_exact_fits_and_a_warning_says_so():
    model = build(DECODERS["plan"])
    z = torch.randn(1, 4, 9, 24, 20, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="must be at least") as refused:
        plan_tiles(model, z.shape, 1000, torch.float32)
    assert "which is what 'tiled: " in str(refused.value)
    budget = int(re.search(r"at least (\d+) bytes", str(refused.value))[1])
    plan = plan_tiles(model, z.shape, budget, torch.float32)
    assert isinstance(plan.strategy, Tiled)
    assert plan.peak_bytes == budget
    assert "(not exact)" in str(plan)
    assert "passed over: streaming" in str(plan)
    with pytest.warns(UserWarning, match="nothing exact fits, seams may show: tiled"):
        frames = gather(decode(model, z, memory_budget=budget))
    assert frames.shape == model(z).shape


@pytest.mark.parametrize("name", DECODERS)
def test_a_tile_as_large_as_the_clip_is_the_clip(name: str):
    model = build(DECODERS[name])
    z = torch.randn(1, 4, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    tiling = Tiling((6, 7), (6, 7), (0, 0), (10_000, 10_000), window=5)
    with torch.no_grad():
        assert torch.equal(gather(decode(model, z, plan=TilePlan(Tiled(tiling)))), model(z))


def test_tiles_that_the_model_does_not_take_are_left_out():
    def model(z: Tensor) -> Tensor:
        if z.shape[2] != 9:
            raise ValueError(f"z must have 9 frames, got {z.shape[2]}")
        return z * 2

    with pytest.raises(ValueError, match="budget must be at least"):
        plan_tiles(model, (1, 4, 9, 40, 33), 1000, torch.float32)


def test_tiles_of_a_model_that_sees_one_pixel_join_without_seams():
    model = torch.nn.Upsample(scale_factor=(1, 2, 2))
    z = torch.randn(1, 4, 9, 40, 33, generator=torch.Generator().manual_seed(0))
    tilings = tilings_for(model, tuple(z.shape), torch.float32, torch.device("cpu"))
    assert len(tilings) > 5
    for tiling in tilings:
        joined = gather(decode(model, z, plan=TilePlan(Tiled(tiling))))
        torch.testing.assert_close(joined, model(z), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", DECODERS)
def test_weights_without_data_are_planned_for_as_those_with(name: str):
    model = build(DECODERS[name])
    plan = plan_tiles(model, SHAPE, "1GiB", torch.float32)
    assert plan_tiles(model.to("meta"), SHAPE, "1GiB", torch.float32) == plan


def test_a_plan_serves_fewer_samples_but_no_other_shape():
    model = build(DECODERS["wan"])
    plan = plan_tiles(model, (2, 4, 3, 4, 4), "1GiB", torch.float32)
    z = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert gather(decode(model, z, plan=plan)).shape == model(z).shape
    for shape in [(3, 4, 3, 4, 4), (2, 4, 4, 4, 4), (2, 5, 3, 4, 4)]:
        with pytest.raises(
            ValueError, match=r"z must have the shape \(2, 4, 3, 4, 4\) that the plan .*, got \("
        ) as refused:
            decode(model, torch.zeros(shape), plan=plan)
        assert str(shape) in str(refused.value)


def test_a_result_in_the_memory_of_its_clip_is_foreseen_there_and_chunks_keep_theirs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_steps, "STEP_BYTES", 1 << 20)
    weight, shape = torch.randn(4, 4, 3, 3, 3), (1, 4, 9, 200, 200)

    def decoder(x: Tensor, may_overwrite: bool = True) -> Tensor:
        hidden = causal_conv3d(x, weight)
        return causal_conv3d(hidden, weight, may_overwrite=may_overwrite) * 2

    def peak(model: object, strategy: object) -> int:
        return plan_tiles(model, shape, "1TiB", torch.float32, strategies=[strategy]).peak_bytes

    apart = partial(decoder, may_overwrite=False)
    saved = peak(apart, Whole()) - peak(decoder, Whole())
    assert 0.8 * 4 * prod(shape) < saved < 1.02 * 4 * prod(shape)
    assert peak(decoder, Streaming(1)) == peak(apart, Streaming(1))
    x = torch.randn(shape)
    assert torch.equal(gather(decode(decoder, x, plan=TilePlan(Streaming(1)))), decoder(x))


@pytest.mark.parametrize(("device", "at_first"), [("cpu", 0), ("cuda", 4096)])
def test_a_host_gives_memory_when_it_is_written_to_and_a_gpu_at_once(device: str, at_first: int):
    with Ledger(torch.device(device)) as ledger:
        out, part = torch.empty(4, 256, device="meta"), torch.ones(256, device="meta")
        assert ledger.live == at_first + 1024
        out[0].copy_(part)
        torch.add(part, 1, out=out[1])
        assert ledger.live == max(at_first, 2048) + 1024
        for _ in range(4):
            out.copy_(part)
        assert ledger.live == 4096 + 1024
        del out, part
        assert ledger.live == 0


def test_predictions_repeat():
    model = build(DECODERS["plan"], torch.bfloat16)
    first, second = (plan_tiles(model, SHAPE, "100MiB", torch.bfloat16) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("text", "number"), [(5, 5), ("10GiB", 10 * 2**30), ("1.5 MiB", 3 * 2**19), ("2 GB", 2 * 10**9), ("7", 7)]
)
def test_budgets_are_read_as_written(text: object, number: int):
    assert parse_bytes(text) == number


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case("open_sora", (1, 4, 11, 120, 120), 1.0), id="open_sora-float32"),
        pytest.param(
            Case("plan", (1, 4, 17, 112, 112), 0.7, "bfloat16"),
            id="plan-bfloat16",
            marks=pytest.mark.skipif(
                torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"),
                reason="takes ten minutes on a CPU that has no instructions for bf16",
            ),
        ),
    ],
)
def test_predicted_memory_is_what_a_fresh_process_measures(case: Case):
    found = measure_afresh(case)
    assert is_met(found), found
