"""What each system can be asked for, and the test that proves it: README's table, made from the tests themselves."""

from __future__ import annotations

from collections.abc import Callable

from tests import test_systems
from tests.tiny_systems import SYSTEMS

CAPABILITIES: dict[str, Callable[..., None]] = {
    "text to video": test_systems.test_text_to_video,
    "text to image": test_systems.test_text_to_image,
    "image to video": test_systems.test_image_to_video,
    "first and last frame": test_systems.test_first_and_last_frame,
    "a video goes on": test_systems.test_a_video_goes_on,
    "a video gets a beginning": test_systems.test_a_video_gets_a_beginning,
    "two videos connected": test_systems.test_two_videos_are_connected,
    "loops of any length": test_systems.test_loops_of_any_length,
    "video to video, by edit ratio": test_systems.test_an_edit_of_nothing_is_a_copy_and_an_edit_of_all_is_not,
    "an edit in a region": test_systems.test_a_region_is_edited_and_the_rest_stays,
    "mask strategies": test_systems.test_a_mask_strategy_places_latent_frames,
    "any duration, size, aspect ratio, frame rate": test_systems.test_any_duration_size_and_aspect_ratio,
    "score and camera suffixes": test_systems.test_scores_and_camera_motion_reach_the_text_encoder,
    "options in the prompt": test_systems.test_a_prompt_brings_options_of_its_own,
    "negative prompt": test_systems.test_a_negative_prompt_changes_the_clip,
    "batches of prompts": test_systems.test_prompts_in_batches,
    "IDDPM, DDIM, DPM-Solver, diffusers' samplers": test_systems.test_other_ways_of_sampling,
}


def systems_of(test: Callable[..., None]) -> list[str]:
    """The systems that a test is run for: those of its own parameter, or all."""
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize" and mark.args[0] == "some_system":
            return list(mark.args[1])
    return list(SYSTEMS)


def rows() -> list[list[str]]:
    """Of the table: a capability, a column for each system, and the test."""
    heads = [name.replace("open-sora-plan-v", "Plan ").replace("open-sora-v", "Open-Sora ") for name in SYSTEMS]
    table = [["", *heads, "test"], ["---", *[":-:"] * len(SYSTEMS), "---"]]
    for capability, test in CAPABILITIES.items():
        has = systems_of(test)
        table.append([capability, *("yes" if name in has else "" for name in SYSTEMS), f"`{test.__name__}`"])
    return table
