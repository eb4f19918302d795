"""What is counted on paper against what real tensors take, and against counts of the same thing in another way."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.measure import mapping_every_tensor
from bench.measure import peak_bytes as resident_peak
from opensora.config import LatteT2VConfig, STDiT2Config, STDiT3Config, STDiTConfig, TransformerConfig
from opensora.estimate import fits
from opensora.estimate.denoisers import Checkpointing, Denoiser, LatentClip
from opensora.estimate.paper import on_paper, peak_bytes, step_memory
from opensora.estimate.placement import SequenceDegree, exchange_bytes, sequence_degree, shard_of
from opensora.estimate.vaes import CausalOnPaper, FramesOnPaper, StackedOnPaper
from opensora.estimate.weights import weight_memory
from opensora.estimate.work import TransformerWork
from opensora.loading import MODEL_OF
from opensora.presets import open_sora_plan_v1_1
from opensora.training.flops import count_flops
from opensora.vae import CausalVideoVAE, FrameVAE, VideoVAE
from opensora_kernels import attention, meta_as
from tests.tiny_models import VAE

_STDIT = {"hidden_size": 96, "depth": 3, "num_heads": 4, "caption_channels": 64, "model_max_length": 16}
CONFIGS: dict[str, TransformerConfig] = {
    "STDiT": STDiTConfig(input_size=(6, 8, 8), **_STDIT),
    "STDiT2": STDiT2Config(qk_norm=True, **_STDIT),
    "STDiT3": STDiT3Config(**_STDIT),
    "LatteT2V": LatteT2VConfig(
        num_attention_heads=4, attention_head_dim=24, cross_attention_dim=96, num_layers=4, caption_channels=64,
        video_length=6, compress_kv_factor=2, model_max_length=16,
    ),
}  # fmt: skip


def real_run(config: TransformerConfig, clip: LatentClip, checkpointing: Checkpointing) -> tuple[nn.Module, Any]:
    """A model of real weights and its forward pass on real inputs, with attention as on meta tensors."""
    torch.manual_seed(0)
    model = MODEL_OF[type(config)](config).train()
    model.set_gradient_checkpointing(checkpointing)
    denoiser = Denoiser(config, torch.float32)
    given = {name: torch.zeros_like(x, device="cpu") for name, x in denoiser._arguments(clip).items()}
    return model, lambda: denoiser._evaluate(model, clip, given)


@pytest.mark.parametrize(("name", "checkpointing"), [*product(CONFIGS, ("none", "full")), ("STDiT3", "selective")])
def test_activations_on_paper_are_those_of_real_tensors(name: str, checkpointing: Checkpointing):
    clip = LatentClip(2, (6, 16, 16), 16, has_frame_mask=name != "LatteT2V")
    model, forward = real_run(CONFIGS[name], clip, checkpointing)
    with sdpa_kernel(SDPBackend.MATH):
        real = step_memory(model, forward)
    found = Denoiser(CONFIGS[name], torch.float32, device_type="cpu").training_memory(clip, checkpointing)
    assert found.kept == pytest.approx(real.kept, rel=0.02)
    assert found.peak == pytest.approx(real.peak, rel=0.02)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to measure a peak")
def test_a_process_takes_the_memory_that_was_counted():
    clip = LatentClip(2, (8, 48, 48), 16)
    model, forward = real_run(replace(CONFIGS["STDiT3"], depth=1), clip, "none")
    found = Denoiser(model.config, torch.float32, device_type="cpu").training_memory(clip, "none")

    def step() -> None:
        result = forward()
        result.backward(torch.ones_like(result))

    with sdpa_kernel(SDPBackend.MATH), mapping_every_tensor():
        step()  # what libraries map once, and gradients
        measured = resident_peak(step, "cpu", is_warm=True)
    assert measured > 150 << 20  # beside which libraries are small
    assert measured == pytest.approx(found.peak, rel=0.1)


def test_kept_bytes_are_those_of_the_tensors_that_autograd_saves():
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 32))
    x = torch.zeros(1000, 64)
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = model(x)
    inputs = x.nbytes + model[2].weight.nbytes  # of the first layer only the input is kept
    del result
    assert step_memory(model, lambda: model(x)).kept == sum(storages.values()) - inputs == 2 * 1000 * 256 * 4


@pytest.mark.parametrize("name", ["STDiT3", "LatteT2V"])
def test_a_fit_says_what_a_run_says(name: str):
    denoiser = Denoiser(CONFIGS[name], torch.bfloat16)
    clip = LatentClip(3, (10, 44, 60), 16, has_frame_mask=name != "LatteT2V")
    assert fits.forward_flops(denoiser, clip) == pytest.approx(denoiser.flops(clip), rel=1e-3)
    if name == "STDiT3":
        direct, fitted = denoiser.training_memory(clip, "full"), fits.training_memory(denoiser, clip, "full")
        assert fitted.kept == pytest.approx(direct.kept, rel=0.02)
        assert fitted.peak == pytest.approx(direct.peak, rel=0.02)


def test_fused_operators_count_as_plain_ones():
    clip = LatentClip(1, (6, 16, 16), 16)
    for config in CONFIGS.values():
        on_gpu, on_cpu = (Denoiser(config, torch.float32, device_type=kind).flops(clip) for kind in ("cuda", "cpu"))
        assert on_gpu == on_cpu > 0


def test_a_training_step_is_three_forward_passes():
    with torch.device("meta"), meta_as("cuda"):
        q, k, v = (torch.empty(2, 50, 4, 16, requires_grad=True) for _ in range(3))
        forward = count_flops(lambda: attention(q, k, v))
        both = count_flops(lambda: attention(q, k, v).sum().backward())
    assert forward == 4 * 2 * 50 * 50 * 4 * 16
    assert both == 3 * forward


def test_work_of_a_batch_counts_images_as_clips_of_one_frame():
    work = TransformerWork(CONFIGS["LatteT2V"])
    text = torch.empty(2, 3, 16, 64, device="meta")
    joint = work.of(torch.empty(2, 4, 8, 16, 16, device="meta"), text, num_images=2)
    clips = work.of(torch.empty(2, 4, 6, 16, 16, device="meta"), text)
    images = work.of(torch.empty(4, 4, 1, 16, 16, device="meta"), text)
    assert float(joint["num_samples"]) == 6
    assert float(clips["num_tokens"]) == 2 * 6 * 64
    for name in ("num_tokens", "flops"):
        assert float(joint[name]) == pytest.approx(float(clips[name]) + float(images[name]))


def test_shards_are_those_of_fsdp():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = Denoiser(CONFIGS["STDiT3"]).build().to(torch.float32)
    model.y_embedder.requires_grad_(False)
    num_ranks = 7  # divides no layer's rows
    found = weight_memory(model, num_ranks=num_ranks)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        mesh = init_device_mesh("cpu", (num_ranks,))
        for block in (*model.spatial_blocks, *model.temporal_blocks):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        local = {name: p.to_local().nbytes for name, p in model.named_parameters()}
        trained = sum(local[name] for name, p in model.named_parameters() if p.requires_grad)
    finally:
        dist.destroy_process_group()
    assert found.parameters == sum(local.values())
    assert found.gradients == found.averages == trained
    assert found.optimizer == 2 * trained


def test_one_rank_holds_all_weights_and_their_fp32_masters():
    model = Denoiser(CONFIGS["STDiT3"]).build()
    number = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    alone = weight_memory(model)
    assert (alone.parameters, alone.optimizer, alone.unsharded) == (2 * number + 4 * trained, 8 * trained, 0)
    assert weight_memory(model, num_ranks=4, sharding="none") == alone


@pytest.mark.parametrize(("num_ranks", "degree"), [(1, "1 x 1"), (4, "4 x 1"), (8, "4 x 2"), (6, "2 x 3")])
def test_heads_are_shared_out_before_a_ring_is_closed(num_ranks: int, degree: str):
    assert str(sequence_degree(num_ranks, num_heads=4)) == degree


def test_ranks_of_a_sequence_share_its_tokens():
    denoiser, clip = Denoiser(CONFIGS["STDiT3"]), LatentClip(2, (6, 18, 14), 16, (144, 112))
    shard = shard_of(denoiser, clip, SequenceDegree(4, 2))
    assert denoiser.num_tokens(shard) == 2 * 6 * 8  # 63 sites over eight ranks
    assert shard_of(denoiser, clip, SequenceDegree()) == clip
    assert exchange_bytes(denoiser, clip, SequenceDegree()) == 0
    assert exchange_bytes(denoiser, clip, SequenceDegree(4, 2)) == 10 * denoiser.num_tokens(shard) * 96 * 2


def _image_vae() -> FrameVAE:
    from diffusers import AutoencoderKL

    types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return FrameVAE(AutoencoderKL(**types, block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=2), 2)


def _on_paper(kind: str) -> Any:
    if kind == "frames":
        return FramesOnPaper(_image_vae(), torch.float32)
    if kind == "stacked":
        return StackedOnPaper(VideoVAE(replace(VAE, micro_batch_size=4)), torch.float32)
    small = replace(open_sora_plan_v1_1.vae(), hidden_size=32, hidden_size_mult=(1, 1, 1, 1), num_res_blocks=1)
    return CausalOnPaper(CausalVideoVAE(small), torch.float32)


@pytest.mark.parametrize(
    ("kind", "direction"),
    [("frames", "encode"), ("frames", "decode"), ("stacked", "encode"), ("stacked", "decode"), ("causal", "encode")],
)
def test_a_vae_on_paper_is_what_a_whole_run_would_be(kind: str, direction: str):
    paper = _on_paper(kind)
    vae = paper.vae.to("meta")
    size = (vae.padded_frames(20) if kind != "frames" else 20, 192, 320)

    def run() -> torch.Tensor:
        if direction == "encode":
            return vae.encode(torch.empty(1, 3, *size, device="meta"))
        z = torch.empty(1, vae.latent_channels, *vae.latent_size(size), device="meta")
        return vae.decode(z, num_frames=size[0])

    with on_paper(), torch.no_grad():
        assert paper.flops(direction, size) == pytest.approx(count_flops(run), rel=0.02)
        assert paper.peak(direction, size) == pytest.approx(peak_bytes(run), rel=0.15)
