"""README.md and CONTRIBUTING.md: every snippet runs, every table agrees with the code, every link leads somewhere.

`python -m tests.test_readme --write` writes the tables of README.md anew.
Bash blocks run command by command in one empty folder; those under a "not run" comment get as far as loading models.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import get_args

import pytest

import opensora_kernels
from opensora import cli
from opensora.presets import tiny
from opensora_kernels import backends
from tests import capabilities

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
ASSETS = tiny.ASSETS
FENCE = re.compile(r"(?:^<!-- not run: (?P<why>[^\n]+) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
# Where a command that is not run stops: everything before has read and checked its arguments.
LAST_CHECK = {
    "sample": "opensora.cli.sample._load",
    "train": "opensora.cli.train._train",
    "train-all": "opensora.cli.train_all._train",
    "estimate": "opensora.cli.estimate._size",
    "encode": "opensora.cli.encode._encode",
    "find-batch-sizes": "opensora.bucket_sizes.build_transformer",
    "train-vae": "opensora.cli.train_vae._train",
    "convert": "opensora.checkpoints.resolve",
    "pack": "opensora.cli.pack._stage",
    "make-tiny-data": "opensora.data.tiny_dataset.make_tiny_dataset",
}
LAST_CHECK_OF_A_RANK = {"train": "opensora.cli.training._context"}
WRITES_THIS_PAGE = ["tests.test_readme", "--write"]


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str
    why_not_run: str | None


def blocks(language: str) -> list:
    found = []
    for page in (README, CONTRIBUTING):
        text = page.read_text()
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start("text"))
            block = Block(page.name, line, match["language"], match["text"], match["why"])
            if block.language == language:
                found.append(
                    pytest.param(
                        block,
                        id=f"{page.name}:{line}",
                    )
                )
    return found


def commands(block: Block) -> list[list[str]]:
    lines = block.text.replace("\\\n", " ").replace(" && ", "\n").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("block", blocks("python"))
def test_python_runs_and_prints_what_its_comments_say(block: Block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = compile("\n" * block.line + block.text, block.page, "exec")
    exec(code, {"__name__": "snippet"})
    assert capsys.readouterr().out.splitlines() == re.findall(r"^print\(.*\)  # (.+)$", block.text, re.M)
    for name in re.findall(r'\.save\("(.+?)"\)', block.text):
        assert Path(name).stat().st_size > 0


@pytest.mark.parametrize("block", blocks("bash"))
def test_commands_run(block: Block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a waterfall\n")
    for line in commands(block):
        words = list(dropwhile(re.compile(r"[A-Z_]+=").match, line))  # settings for one command
        if words[0] == "opensora":
            check_opensora(words[1:], block, LAST_CHECK, monkeypatch)
        elif words[0] == "torchrun":  # what each of its processes does before it looks for the others
            check_opensora(words[words.index("opensora") + 1 :], block, LAST_CHECK_OF_A_RANK, monkeypatch)
        elif words[:2] == ["python", "-m"]:
            if words[2:] != WRITES_THIS_PAGE:
                run_module(words[2], words[3:], monkeypatch)
        elif words[0] == "make":
            assert all(target in makefile_targets() for target in words[1:] if "=" not in target), words
        elif words[:2] == ["python", "setup.py"]:  # tests/test_build.py asks it what it decides
            assert words[2:] == ["build_ext", "--inplace"], words
        elif words[:2] == ["pip", "install"]:
            assert extras(words[-1]) <= declared_extras(), words
        else:
            assert words[0] in ("ruff", "pytest", "clang-format"), f"no rule for the command {words[0]!r}"
            paths = [word for word in words[1:] if "/" in word]
            assert all(any(ROOT.glob(path)) for path in paths), words


def check_opensora(arguments: list[str], block: Block, last_check: dict[str, str], monkeypatch) -> None:
    if block.why_not_run is not None:
        with monkeypatch.context() as patch:
            patch.setattr(last_check[arguments[0]], stop)
            with pytest.raises(ReachedTheEnd):
                cli.main(arguments)
        return
    steps = ["--num-sampling-steps", "2"] if arguments[0] == "sample" else []
    assert cli.main([*arguments, *steps]) == 0, arguments
    if "-o" in arguments:
        assert Path(arguments[arguments.index("-o") + 1]).stat().st_size > 0


class ReachedTheEnd(Exception):
    """The command found nothing wrong with its arguments."""


def stop(*arguments: object, **options: object) -> None:
    raise ReachedTheEnd


def run_module(name: str, arguments: list[str], monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [name, *arguments])
        patch.delitem(sys.modules, f"{name}.__main__", raising=False)  # runpy warns of modules imported before
        with pytest.raises(SystemExit) as end:
            runpy.run_module(name, run_name="__main__")
    assert end.value.code in (0, None), (name, *arguments)


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))


def extras(requirement: str) -> set[str]:
    return set(re.findall(r"\w+", requirement.partition("[")[2]))


def declared_extras() -> set[str]:
    table = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^(\w+) = ", table, re.M))


@pytest.mark.parametrize("page", [README, CONTRIBUTING], ids=lambda page: page.name)
def test_links_and_pictures_lead_to_files(page: Path):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_recipe_of_the_embedded_model_is_that_of_its_preset():
    recipe = "".join(f"{line}\n" for line in tiny.__doc__.splitlines() if line.startswith("opensora "))
    assert recipe
    assert f"```bash\n{recipe}" in README.read_text()


def test_operator_table_is_that_of_the_registry():
    assert table("backends") == operator_table()


def test_quality_table_is_that_of_the_record():
    assert table("quality") == quality_table()


def test_capability_table_is_that_of_the_tests():
    assert table("systems") == as_table(capabilities.rows())


def test_no_figure_is_left_open():
    assert re.findall(r"\{\{\w+\}\}", README.read_text()) == []


def operator_table() -> str:
    registered = {name for op in backends.ops() for name in backends.backends_of(op)}
    columns = sorted(registered, key=get_args(backends.Backend).index)
    rows = [["operator", "computes", *(f"`{column}`" for column in columns)], ["---"] * 2 + [":-:"] * len(columns)]
    for op in backends.ops():
        purpose = getattr(opensora_kernels, op).__doc__.splitlines()[0].rstrip(".")
        purpose = re.sub(r"([*|])", r"\\\1", purpose)
        has = backends.backends_of(op)
        rows.append([f"`{op}`", purpose, *("yes" if column in has else "" for column in columns)])
    return as_table(rows)


def quality_table() -> str:
    figures = json.loads((ASSETS / "quality.json").read_text())
    asked = f"of {figures['pairs']} clips from new seeds"
    return as_table(
        [
            ["measured", ""],
            ["---", "--:"],
            [f"colour as the prompt says, {asked}", f"{100 * figures['color_right']:.1f} %"],
            [f"direction as the prompt says, {asked}", f"{100 * figures['direction_right']:.1f} %"],
            [
                "PSNR of the VAE on a film it was not trained on (carphone; watched while choosing the recipe)",
                f"{figures['psnr_heldout_db']:.1f} dB",
            ],
            ["PSNR of the VAE on its training clips", f"{figures['psnr_training_db']:.1f} dB"],
        ]
    )


def as_table(rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def table(name: str) -> str:
    return README.read_text().split(f"<!-- {name}: begin -->\n")[1].split(f"<!-- {name}: end -->")[0]


def write_tables() -> None:
    text = README.read_text()
    tables = {"backends": operator_table(), "quality": quality_table(), "systems": as_table(capabilities.rows())}
    for name, made in tables.items():
        text = text.replace(f"begin -->\n{table(name)}<!-- {name}: end", f"begin -->\n{made}<!-- {name}: end")
    README.write_text(text)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m tests.test_readme --write")
    write_tables()
