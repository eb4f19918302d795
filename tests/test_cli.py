"""The command line: what it writes, that twice is the same, and that wrong input is one line and exit status 2."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opensora import presets
from opensora.cli import COMMANDS, main
from opensora.cli.training import _context
from opensora.config import TrainConfig, TrainVAEConfig
from opensora.data.loader import skipped_logger
from opensora.data.reading import probe, read_frames
from opensora.parallel import ParallelContext
from opensora.presets.scaling import scaled
from opensora.training import TrainingResult
from tests.tiny_models import save_tiny_models

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    torch.set_num_threads(1)
    folder = save_tiny_models(tmp_path_factory.mktemp("models"))
    return [
        *("--vae", str(folder / "vae"), "--checkpoint", str(folder / "transformer")),
        *("--text-encoder", str(folder / "text_encoder"), "--image-size", "16", "16", "--num-sampling-steps", "3"),
    ]


def refused(capsys, *arguments: str) -> str:
    """The one line that a refused command prints."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("opensora")
    return lines[0]


def test_processes_of_torchrun_make_a_clip_together(models, tmp_path, capsys):
    arguments = ["sample", *models, "--image-size", "32", "48", "--prompt", "a red circle", "--num-frames", "1"]
    assert main([*arguments, "-o", str(tmp_path / "alone.png")]) == 0
    capsys.readouterr()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "opensora", *arguments, "--ring", "2", "-o", str(tmp_path / "together.png")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("together.png") == 1  # one rank writes and tells
    alone, together = (read_frames(tmp_path / f"{name}.png").int() for name in ("alone", "together"))
    assert alone.shape[-2:] == (32, 48)
    assert (alone - together).abs().max() <= 1  # a rounding to 256 levels
    assert "ring: must divide the number of processes, 1, got 2" in refused(capsys, *arguments, "--ring", "2")


def test_every_rank_names_the_files_that_it_skips(monkeypatch):
    def of_second_rank(*arguments: object, **options: object) -> ParallelContext:
        return ParallelContext(rank=1, world_size=2)

    monkeypatch.setattr(ParallelContext, "from_environment", of_second_rank)
    root = logging.getLogger()
    before = root.level
    try:
        _context(TrainConfig())
        assert not logging.getLogger("opensora.data.loader").isEnabledFor(logging.WARNING)
        assert skipped_logger.isEnabledFor(logging.WARNING)
    finally:
        root.setLevel(before)
        skipped_logger.setLevel(logging.NOTSET)


def test_a_prompt_becomes_a_video_and_a_contact_sheet_twice_the_same(models, tmp_path, capsys):
    for name in ("first", "second"):
        arguments = ["sample", *models, "--prompt", "a red circle", "--seed", "3", "-o", str(tmp_path / f"{name}.mp4")]
        assert main(arguments) == 0
    assert (tmp_path / "first.mp4").read_bytes() == (tmp_path / "second.mp4").read_bytes()
    assert probe(tmp_path / "first.mp4").num_frames == 17
    output = capsys.readouterr().out
    assert str(tmp_path / "second.mp4") in output
    assert str(tmp_path / "second-sheet.png") in output
    for stage in ("load", "text", "denoise", "decode"):
        assert stage in output
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}{suffix}" for name in ("first", "second") for suffix in (".mp4", "-sheet.png")
    )


def test_one_frame_is_written_as_png(models, tmp_path):
    assert main(["sample", *models, "--prompt", "a red circle", "--num-frames", "1", "--save-dir", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["sample_0000.png"]


def test_a_prompt_file_makes_one_clip_per_line_and_a_part_of_it_the_same_clips(models, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\na blue square\na green triangle\n")
    common = ["sample", *models, "--prompt-path", str(file), "--contact-sheet", "no"]
    assert main([*common, "--save-dir", str(tmp_path / "all"), "--batch-size", "1"]) == 0
    assert main([*common, "--save-dir", str(tmp_path / "part"), "--start-index", "1", "--end-index", "2"]) == 0
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == [f"sample_000{i}.mp4" for i in range(3)]
    assert [p.name for p in (tmp_path / "part").iterdir()] == ["sample_0001.mp4"]
    name = "sample_0001.mp4"
    assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "all" / name).read_bytes()


def test_a_repeated_prompt_option_adds_prompts(models, tmp_path):
    arguments = ["sample", *models, "--prompt", "a red circle", "--prompt", "a blue square", "a green triangle"]
    assert main([*arguments, "--contact-sheet", "no", "--save-dir", str(tmp_path)]) == 0
    assert len(list(tmp_path.iterdir())) == 3


def test_prompts_as_file_names_skip_what_exists(models, tmp_path, capsys):
    arguments = ["sample", *models, "--prompt", "a red/blue circle", "--prompt-as-path", "yes", "--save-dir"]
    assert main([*arguments, str(tmp_path)]) == 0
    assert (tmp_path / "a red blue circle-0.mp4").exists()
    capsys.readouterr()
    assert main([*arguments, str(tmp_path)]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_an_interrupted_batch_goes_on_where_it_stopped(models, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\na blue square\na green triangle\n")
    common = [
        "sample",
        *models,
        "--prompt-path",
        str(file),
        "--contact-sheet",
        "no",
        "--save-dir",
        str(tmp_path / "out"),
    ]
    assert main(common) == 0
    finished = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "sample_0001.mp4").unlink()
    capsys.readouterr()
    assert main([*common, "--resume", "yes"]) == 0
    printed = capsys.readouterr().out
    assert "sample_0001.mp4" in printed
    assert "sample_0000.mp4" not in printed
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == finished


def test_texts_are_kept_in_a_folder_and_models_leave_the_device(models, tmp_path):
    common = ["sample", *models, "--prompt", "a red circle", "--contact-sheet", "no", "--offload", "yes"]
    cache = tmp_path / "texts"
    for name in ("first", "again"):
        assert main([*common, "--text-cache", str(cache), "-o", str(tmp_path / f"{name}.mp4")]) == 0
    assert len(list(cache.rglob("*.safetensors"))) == 1
    assert "model.safetensors" in (cache / "encoder_digests.json").read_text()
    assert (tmp_path / "first.mp4").read_bytes() == (tmp_path / "again.mp4").read_bytes()


def test_a_way_of_sampling_that_the_model_was_not_trained_for_is_refused(models, tmp_path, capsys):
    line = refused(
        capsys, "sample", *models, "--prompt", "a circle", "--sample-method", "PNDM", "-o", str(tmp_path / "a.mp4")
    )
    assert "sample_method: must be one of rflow for tiny, got 'PNDM'" in line


def test_a_bad_line_of_a_prompt_file_is_named_before_any_work(models, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text('a red circle\n\na blue square {"reference_path": 7}\n')
    line = refused(capsys, "sample", *models, "--prompt-path", str(file), "--save-dir", str(tmp_path / "out"))
    assert "prompts.txt, line 3: " in line
    assert "reference_path must be a string" in line
    assert not (tmp_path / "out").exists()
    file.write_bytes(b"a red circle\na \xff\xfe circle\n")
    assert "line 2: is not UTF-8" in refused(capsys, "sample", *models, "--prompt-path", str(file))
    file.write_text("\n\n")
    assert "holds 0 prompts" in refused(capsys, "sample", *models, "--prompt-path", str(file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "preset: must be one of tiny, open-sora-v1.2, open-sora-v1.1, "),
        ([], "give either --prompt"),
        (["--prompt", "a", "--prompt-path", "b.txt"], "give either --prompt"),
        (["--prompt-path", "absent.txt"], "No such file"),
        (["--prompt", "a", "--num-frames", "many"], "num_frames: must be a positive number"),
        (["--prompt", "a", "--num-frames", "0"], "num_frames: must be a positive number"),
        (["--prompt", "a", "--resolution", "241p", "--aspect-ratio", "9:16"], "resolution: must be one of 144p"),
        (["--prompt", "a", "--resolution", "240p"], "resolution and aspect_ratio: must be given together"),
        (["--prompt", "a", "--resolution", "240p", "--aspect-ratio", "9:1"], "aspect_ratio: 240p must be given one of"),
        (["--prompt", "a", "--image-size", "1", "1"], "smaller than one latent"),
        (["--prompt", "a", "--num-sampling-steps", "0"], "num_sampling_steps: must be at least 1"),
        (["--prompt", "a", "--dtype", "fp8"], "fp8"),
        (["--prompt", "a", "--seed", "x"], 'option "seed"'),
        (["--prompt", "a", "--sed", "3"], "unrecognized arguments: --sed"),
        (["--prompt", "a", "b", "-o", "out.mp4"], "holds one clip, but 2 are asked for"),
        (["--prompt", "a", "-o", "out.avi"], "output: must end in .mp4, .gif"),
        (["--prompt", "a", "--reference-path", "absent.png"], "no such file"),
        (["--prompt", "a", "--mask-strategy", "0,0,0,0,1,0,9"], "at most 6 fields"),
        (["--prompt", "a", "--loop", "2", "--condition-frame-length", "5"], "condition_frame_length: must lie between"),
        (["--prompt", "a", "--loop", "2", "--num-frames", "1"], "a clip of one latent frame cannot go on"),
        (["--prompt", "a", "--loop", "2", "--condition-frame-edit", "2"], "condition_frame_edit: must lie in [0, 1]"),
        (["--prompt", "a", "--align", "0"], "align: must be at least 1"),
        (["--prompt", "a", "--save-fps", "0"], "save_fps: must be positive"),
        (["--prompt", "a", "--seed", str(2**63)], "seed: must lie in"),
        (["--prompt", "a", "--device", "toaster"], "device: must be auto or a device torch knows, got 'toaster'"),
        (["--prompt", "a", "--device", "vulkan"], "device: must be one that this machine has"),
        (["--prompt", "a", "--vae", "nowhere/at/all"], "neither an existing folder"),
    ],
)
def test_wrong_sample_input_is_one_line(models, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    size = arguments[arguments.index("--image-size") :] if "--image-size" in arguments else []
    given = models[:6] if {"--resolution"} & set(arguments) else models
    assert message in refused(capsys, "sample", *given, *arguments, *size)
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_one_line_and_a_mistake_of_ours_is_not(monkeypatch, capsys):
    def fail(arguments: list[str]) -> int:
        raise torch.OutOfMemoryError("out of memory: tried to allocate 3 GiB") if arguments else RuntimeError("bug")

    monkeypatch.setattr("opensora.cli.sample.run", fail)
    assert "out of memory: tried to allocate 3 GiB" in refused(capsys, "sample", "--prompt")
    with pytest.raises(RuntimeError, match="bug"):
        main(["sample"])


def test_a_checkpoint_with_wrong_keys_lists_them(models, capsys):
    folders = {models[i]: models[i + 1] for i in range(0, 6, 2)}
    weights = Path(folders["--vae"]) / "model.safetensors"
    other = Path(folders["--checkpoint"]).parent / "wrong"
    other.mkdir(exist_ok=True)
    (other / "model.safetensors").write_bytes(weights.read_bytes())
    (other / "config.json").write_text((Path(folders["--checkpoint"]) / "config.json").read_text())
    line = refused(capsys, "sample", *models, "--checkpoint", str(other), "--prompt", "a")
    assert "does not fit STDiT3" in line
    assert "missing (rope.freqs" in line
    assert "unexpected (" in line


def test_unknown_commands_list_the_known_and_help_is_no_error(capsys):
    assert f"commands: {', '.join(COMMANDS)}" in refused(capsys, "draw")
    assert main([]) == 0
    assert main(["--version"]) == 0
    for command in COMMANDS:
        with pytest.raises(SystemExit) as leaving:
            main([command, "--help"])
        assert leaving.value.code == 0
    told = capsys.readouterr().out
    assert "--optimizer.warmup-steps" in told
    assert " at 0x" not in told, "a type without a name"


@pytest.fixture
def trained(monkeypatch) -> list[tuple[object, bool]]:
    """Calls of the trainers, which here only note their configuration."""
    calls: list[tuple[object, bool]] = []

    def train(config: TrainConfig | TrainVAEConfig, resume: bool, context: ParallelContext) -> TrainingResult:
        calls.append((config, resume))
        return TrainingResult(7, 0.5, config.run.steps == 13, Path("checkpoint"), Path("model"))

    monkeypatch.setattr("opensora.cli.train._train", train)
    monkeypatch.setattr("opensora.cli.train_vae._train", train)
    return calls


def test_training_options_change_single_fields_of_a_preset(trained, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("optimizer: {ema_decay: 0.5}\nsteps: 11\n".replace("steps", "run.steps"))
    arguments = ["train", "--preset", "tiny", "--config", str(tmp_path / "run.yaml"), "--resume"]
    arguments += ["--optimizer.lr", "0.002", "--data.image-size", "[32, 48]", "--mask-ratios", '{"image_head": 0.3}']
    assert main([*arguments, "-o", "there", "--train-text-encoder", "no"]) == 0
    config, resume = trained[0]
    default = presets.get("tiny").training["uniform"]
    assert resume
    assert (config.optimizer.lr, config.optimizer.ema_decay, config.run.steps) == (0.002, 0.5, 11)
    assert (config.data.image_size, config.mask_ratios) == ((32, 48), {"image_head": 0.3})
    assert (config.run.output, config.train_text_encoder) == ("there", False)
    assert config.transformer == default.transformer
    assert "step 7, loss 0.5" in capsys.readouterr().out


def test_without_options_training_is_the_preset(trained):
    assert main(["train-vae"]) == 0
    assert main(["train", "--preset", "open_sora_v1_2", "--stage", "stage2"]) == 0
    stage, expected = next(iter(presets.get("tiny").vae_training.items()))
    assert trained[0] == (replace(expected, run=replace(expected.run, recipe=f"tiny/{stage}")), False)
    expected = presets.get("open_sora_v1_2").training["stage2"]
    assert trained[1] == (replace(expected, run=replace(expected.run, recipe="open-sora-v1.2/stage2")), False)


def test_a_stage_is_named_with_its_preset_and_scaled_down(trained, monkeypatch):
    made = []
    monkeypatch.setattr("opensora.tiny_parts.complete", lambda config, folder: made.append(folder) or config)
    assert main(["train", "--preset", "open-sora-1.2-stage3", "--scale", "tiny", "-o", "there", "--steps", "7"]) == 0
    config = trained[0][0]
    assert made == ["there/parts"]
    assert (config.run.output, config.run.steps) == ("there", 7)
    assert config.transformer == scaled(presets.get("open-sora-v1.2").training["stage3"], "tiny").transformer
    assert config.run.recipe == "open-sora-v1.2/stage3/tiny"


def test_a_stopped_training_says_how_to_go_on(trained, capsys):
    assert main(["train", "--steps", "13"]) == 130
    assert "--resume goes on after step 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--preset", "huge"], "preset: must be one of"),
        (["train", "--preset", "open-sora-1.2-stage9"], "stages of open-sora-v1.2 are stage1, stage2, stage3, adapt-1"),
        (["train", "--preset", "open-sora-1.2-stage1", "--stage", "stage2"], "'stage1' in --preset and --stage"),
        (["train", "--scale", "small"], "scale: must be one of full, tiny, got 'small'"),
        (["train-vae", "--preset", "open-sora-1.1"], "open-sora-v1.1 has no stages for opensora train-vae"),
        (["train-all", "--only", "close-sora"], "only: must be the beginning of one of open-sora-v1.2 adapt-1-images"),
        (["train", "--stage", "stage9"], "stage: preset tiny has uniform, shifted, motion, got 'stage9'"),
        (["train", "--optimizer.lr", "fast"], 'option "optimizer.lr"'),
        (["train", "--optimizer.decay", "linear"], "linear"),
        (["train", "--data.image-size", "[64]"], "data.image_size"),
        (["train-vae", "--config", "absent.yaml"], "File does not exist"),
        (["train-vae", "--data-path", "absent.csv", "--run.output", "out"], "absent.csv"),
    ],
)
def test_wrong_training_input_is_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_control_c_keeps_finished_clips_and_leaves_no_half_written_ones(models, tmp_path):
    command = [sys.executable, "-m", "opensora", "sample", *models, "--num-sampling-steps", "50", "--num-sample", "99"]
    command += ["--prompt", "a red circle", "--save-dir", str(tmp_path)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # a shell starts its background jobs with SIGINT ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*.mp4")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    files = sorted(tmp_path.iterdir())
    assert f"stopped; {len(files)} of 99 clips are finished and saved" in errors
    assert "Traceback" not in errors
    assert all(path.suffix == ".mp4" and probe(path).num_frames == 17 for path in files)
