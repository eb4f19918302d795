"""What `opensora train` and `opensora train-vae` share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from opensora import presets
from opensora.cli import CommandError
from opensora.cli.options import Parser, add_config_options, config_from_options, early_option
from opensora.config import Preset
from opensora.presets.scaling import scaled

if TYPE_CHECKING:
    from opensora.parallel import ParallelContext
    from opensora.training import TrainingResult

Config = TypeVar("Config")

# Short names of much used options; among them those of Open-Sora's own commands.
ALIASES = {
    "run.output": ("--output", "-o", "--outputs"),
    "run.steps": ("--steps",),
    "run.seed": ("--seed",),
    "run.dtype": ("--dtype",),
    "run.device": ("--device",),
    "data.manifest": ("--data-path",),
    "data.batch_size": ("--batch-size",),
    "optimizer.lr": ("--lr",),
    "optimizer.warmup_steps": ("--warmup-steps",),
    "initial_transformer": ("--checkpoint", "--ckpt-path"),
    "initial_vae": ("--checkpoint", "--ckpt-path"),
}


@dataclass(frozen=True)
class StageChoice(Generic[Config]):
    """A stage of a preset at a scale, read before other options are known, whose defaults are its configuration's."""

    preset: Preset
    stage: str
    scale: str
    config: Config
    stages: tuple[str, ...]

    def add_options(self, parser: Parser) -> None:
        add = parser.add_argument
        add("--preset", type=str, default=self.preset.name, help=f"one of {', '.join(presets.names())}")
        add("--stage", type=str, default=self.stage, help=f"one of {', '.join(self.stages)}")
        scale_help = "tiny takes the stage's twin for a CPU, with clips and a VAE that it makes"
        add("--scale", type=str, default=self.scale, help=f"full or tiny: {scale_help}")
        add("--config", action="config", help="YAML file with any of the options below")

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse a choice in the file: its defaults would not be those of the options."""
        given = presets.get_with_stage(options["preset"])[0].name
        if (given, options["stage"], options["scale"]) != (self.preset.name, self.stage, self.scale):
            raise CommandError("preset, stage and scale: must be given as options, not in the --config file")

    def complete(self, config: Config) -> Config:
        """With the files that a tiny twin makes for itself, below its output folder."""
        if self.scale != "tiny":
            return config
        from opensora.tiny_parts import complete  # imports the models: not for --help

        return complete(config, f"{config.run.output}/parts")


def choose_stage(
    command: str, arguments: Sequence[str], stages: Callable[[Preset], Mapping[str, Config]]
) -> StageChoice[Config]:
    """What --preset, --stage and --scale say. Errors: CommandError for a stage that the preset lacks."""
    preset, named_stage = presets.get_with_stage(early_option(arguments, "--preset", presets.names()[0]))
    available = stages(preset)
    if not available:
        raise CommandError(f"preset: {preset.name} has no stages for opensora {command}")
    stage = early_option(arguments, "--stage", named_stage or next(iter(available)))
    if stage not in available or named_stage not in (None, stage):
        raise CommandError(f"stage: preset {preset.name} has {', '.join(available)}, got {named_stage or stage!r}")
    scale = early_option(arguments, "--scale", "full")
    return StageChoice(preset, stage, scale, scaled(available[stage], scale), tuple(available))


def run_training(
    command: str,
    description: str,
    arguments: Sequence[str],
    *,
    stages: Callable[[Preset], Mapping[str, Config]],
    train: Callable[[Config, bool, ParallelContext], TrainingResult],
) -> int:
    """Read a configuration (preset, then --config, then options), train, and say where the results are.

    Under torchrun each process is one rank, and the main one alone tells how it goes.
    """
    choice = choose_stage(command, arguments, stages)
    parser = Parser(command, description)
    choice.add_options(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")
    add_config_options(parser, choice.config, ALIASES)
    options = parser.parse(arguments)
    choice.check(options)
    config = choice.complete(config_from_options(type(choice.config), options))
    if not config.run.recipe:
        recipe = _recipe(choice.preset.name, choice.stage, choice.scale)
        config = replace(config, run=replace(config.run, recipe=recipe))
    context = _context(config)
    result = train(config, options["resume"], context)
    context.close()
    if context.is_main:
        print(f"step {result.step}, loss {result.loss:.6g}")
        print(f"model:      {result.model}")
        print(f"checkpoint: {result.checkpoint}")
    if result.was_stopped:
        raise KeyboardInterrupt(f"the same command with --resume goes on after step {result.step}")
    return 0


def _context(config: Any) -> ParallelContext:
    from opensora.parallel import DTYPES, ParallelContext  # imports torch: not for --help

    context = ParallelContext.from_environment(config.parallel, config.run.device, dtype=DTYPES[config.run.dtype])
    if not context.is_main:
        logging.getLogger().setLevel(logging.ERROR)
        logging.getLogger("opensora.data.loader.skipped").setLevel(logging.WARNING)
    return context


def _recipe(preset: str, stage: str, scale: str) -> str:
    return f"{preset}/{stage}" if scale == "full" else f"{preset}/{stage}/{scale}"
