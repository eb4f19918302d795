"""The recorded answers of the original systems: the committed cases always, all others where they are at hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.oracles.__main__ import find_cases, load_adapters, main, replay
from tests.oracles.registry import Case

COMMITTED = Path(__file__).parent / "oracles" / "data"
SHARED = Path(__file__).parents[2] / "shared" / "oracles"
ALL = SHARED / "open-sora"
SIZE_LIMIT = 8_000_000
# Of Open-Sora-Plan, cases that evaluate wait.
LATER = ("eval-metrics",)

committed_cases = find_cases(COMMITTED)
committed_names = {case.name for case in committed_cases}
other_cases = [case for case in find_cases(ALL) if case.name not in committed_names]
plan_cases = [case for case in find_cases(SHARED / "open-sora-plan") if not case.name.startswith(LATER)]


@pytest.fixture(autouse=True, scope="module")
def _adapters():
    load_adapters()


def assert_replays(case: Case) -> None:
    results = list(replay(case))
    assert results, f"{case.name}: nothing was compared"
    failures = [f"{tensor}: max abs {r.max_abs:.2e}, {r.reason}" for tensor, r in results if not r.is_pass]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("case", committed_cases, ids=lambda case: case.name)
def test_a_committed_answer_is_reproduced(case: Case):
    assert_replays(case)


@pytest.mark.parametrize("case", other_cases or [None], ids=lambda case: case.name if case else "none")
def test_every_other_answer_is_reproduced(case: Case | None):
    if case is None:
        pytest.skip("the full set is not at hand: no folder ../shared/oracles/open-sora beside this checkout")
    assert_replays(case)


@pytest.mark.parametrize("case", plan_cases or [None], ids=lambda case: case.name if case else "none")
def test_every_answer_of_open_sora_plan_is_reproduced(case: Case | None):
    if case is None:
        pytest.skip("the full set is not at hand: no folder ../shared/oracles/open-sora-plan beside this checkout")
    assert_replays(case)


@pytest.mark.skipif(not ALL.exists(), reason="no folder ../shared/oracles/open-sora beside this checkout")
@pytest.mark.parametrize("case", committed_cases, ids=lambda case: case.name)
def test_a_committed_case_is_a_copy_of_the_full_sets(case: Case):
    for file in case.path.iterdir():
        assert file.read_bytes() == (ALL / case.name / file.name).read_bytes(), file.name


def test_the_committed_cases_stay_small():
    assert sum(file.stat().st_size for file in COMMITTED.rglob("*")) <= SIZE_LIMIT


@pytest.fixture
def copied(tmp_path: Path):
    """A copy of a committed case, to be spoilt."""

    def copy(name: str) -> Path:
        (path,) = (case.path for case in committed_cases if case.name == name)
        return Path(shutil.copytree(path, tmp_path / name))

    return copy


def spoil(folder: Path, name: str, change) -> None:
    outputs = load_file(folder / "outputs.safetensors")
    outputs[name] = change(outputs[name]).contiguous()
    save_file(outputs, folder / "outputs.safetensors")


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_the_runner_reports_what_it_compared_and_exits_with_zero(copied, capsys):
    assert main([str(copied("rflow_training_loss").parent)]) == 0
    *lines, summary = rows(capsys.readouterr().out)
    assert [line[:2] for line in lines] == [["rflow_training_loss", tensor] for tensor in ("loss", "x_t", "t_model")]
    assert all(line[-1] == "PASS" and float(line[2]) <= 1e-3 for line in lines)
    assert " ".join(summary) == "1 cases: 3 of 3 checks passed; 0 cases without adapter"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x + 1e-4, "limit 1.00e-05"),
        (lambda x: torch.where(torch.arange(x.numel()).view(x.shape) == 1, torch.nan, x), "NaN in other places"),
        (lambda x: x[..., :-1], "shape"),
    ],
    ids=["value", "nan", "shape"],
)
def test_the_runner_fails_one_spoilt_tensor(copied, capsys, change, reason: str):
    folder = copied("rflow_training_loss")
    spoil(folder, "x_t", change)
    assert main([str(folder)]) == 1
    output = capsys.readouterr().out
    (failed,) = [line for line in output.splitlines() if "FAIL" in line]
    assert failed.split()[:2] == ["rflow_training_loss", "x_t"]
    assert reason in failed
    assert "2 of 3 checks passed" in output


def test_the_runner_fails_a_spoilt_answer_about_strings(copied, capsys):
    folder = copied("aspect_lookup")
    cases = json.loads((folder / "cases.json").read_text())
    cases["get_num_frames"][0]["ok"] += 1
    (folder / "cases.json").write_text(json.dumps(cases))
    assert main([str(folder)]) == 1
    assert "get_num_frames.0" in next(line for line in capsys.readouterr().out.splitlines() if "FAIL" in line)


def test_the_runner_fails_a_case_it_cannot_run_and_goes_on(copied, capsys):
    (copied("rflow_timestep_transform") / "outputs.safetensors").unlink()
    folder = copied("rflow_training_loss").parent
    assert main([str(folder)]) == 1
    captured = capsys.readouterr()
    assert "FAIL KeyError" in captured.out
    assert "Traceback" in captured.err
    assert captured.out.count("PASS") == 3


def test_the_runner_fails_when_there_is_nothing_to_run(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "no cases in" in capsys.readouterr().out
    assert main([str(COMMITTED), "--filter", "absent"]) == 1
