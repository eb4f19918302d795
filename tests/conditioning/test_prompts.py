import pytest

from opensora.conditioning.prompts import (
    PromptParts,
    append_scores,
    merge_loops,
    prompt_for_loop,
    split_json,
    split_loops,
)


def test_json_after_the_text_names_references():
    prompt = 'two refs {"mask_strategy": "0;0,1,0,-1,1", "reference_path": "a.png;b.png"}'
    assert split_json(prompt) == PromptParts("two refs ", "a.png;b.png", "0;0,1,0,-1,1")
    assert split_json("plain") == PromptParts("plain", "", "")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ('a {"foo": 1}', "JSON keys must be among reference_path, mask_strategy, start, .*, got 'foo'"),
        ('a {"reference_path": ["x"]}', r"reference_path must be a string, got \['x'\]"),
        ("a {b} {c}", "what follows the first brace must be JSON"),
        ('a {"reference_path": "x"} tail', "what follows the first brace must be JSON"),
    ],
)
def test_malformed_json_is_refused(prompt: str, message: str):
    with pytest.raises(ValueError, match=message):
        split_json(prompt)


def test_loops_split_and_merge():
    texts, starts = split_loops("|0| a cat |2| a dog")
    assert (texts, starts) == (["a cat", "a dog"], [0, 2])
    assert split_loops(merge_loops(texts, starts)) == (texts, starts)
    assert split_loops("a | b") == (["a | b"], None)
    assert [prompt_for_loop("|0|a|2|b", loop) for loop in range(4)] == ["a", "a", "b", "b"]


@pytest.mark.parametrize("prompt", ["|0|a|2", "|0|a|b|c", "|0|a|2|b|1|c"])
def test_malformed_loops_are_refused(prompt: str):
    with pytest.raises(ValueError, match=r"loops must be written \|0\|text\|number\|text"):
        split_loops(prompt)


def test_scores_are_appended_once():
    once = append_scores("a cat.", aes=6.5, flow=4, camera_motion="pan left")
    assert once == "a cat. aesthetic score: 6.5. motion score: 4.0. camera motion: pan left."
    assert append_scores(once, aes=1.0, flow=1, camera_motion="static") == once
    assert append_scores("a cat.") == "a cat."
