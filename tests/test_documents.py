"""The documents are correct: links have targets, commands and options exist, generated tables are current.

To update the table of settings: PYTHONPATH=tests python tests/test_documents.py
"""

import inspect
import re
import shlex
from pathlib import Path

import pytest

from ltkd.cli.main import cli
from serve.settings import PREFIX, Settings

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SERVICE = ROOT / "docs" / "service.md"
BEGIN, END = "<!-- settings: begin -->", "<!-- settings: end -->"
ALLOWED_ADDRESSES = ("https://arxiv.org/", "https://doi.org/", "#")


def settings_table() -> str:
    """Every setting with its default and meaning, from the code."""
    described = re.split(r"\n    (?=\w+: )", inspect.cleandoc(Settings.__doc__ or "").partition("Attributes:")[2])
    meanings = dict(re.sub(r"\s+", " ", text).strip().split(": ", 1) for text in described if text.strip())
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f"`{field.default}`"
        meaning = meanings[name].replace("``", "`")
        rows.append(f"| `{PREFIX}{name.upper()}` | {default} | {meaning} |")
    return "\n".join(rows)


def commands(text: str) -> list[list[str]]:
    """The words of every ``ltkd`` command in code blocks; lines that end with a backslash are joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"(?:^    \S.*\n)+", text, flags=re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        for place, word in enumerate(words):
            if word in ("ltkd", ".venv/bin/ltkd") and words[place - 1 : place] in ([], ["-m"]):
                found.append(words[place + 1 :])
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_target_of_every_link_exists(document: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        assert target.startswith(ALLOWED_ADDRESSES) or (document.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if path.name != "lab-book.md"], ids=lambda path: path.name
)
def test_every_command_and_option_exists(document: Path) -> None:
    for words in commands(document.read_text()):
        assert words and (words[0] in cli.commands or words[0].startswith("-")), words
        if words[0] in cli.commands:
            options = {flag for option in cli.commands[words[0]].params for flag in option.opts} | {"--help"}
            assert {word for word in words[1:] if re.fullmatch(r"--?[a-z][a-z-]*", word)} <= options, words


def test_the_documents_show_every_command() -> None:
    shown = [words for document in DOCUMENTS for words in commands(document.read_text())]
    assert {words[0] for words in shown if words} >= set(cli.commands) - {"pipeline"}
    assert ["distill", "runs/teacher", "--out", "runs/student"] in shown  # also after torchrun


def test_the_table_of_settings_agrees_with_the_code() -> None:
    written = SERVICE.read_text().partition(BEGIN)[2].partition(END)[0].strip()
    assert written == settings_table(), "run: PYTHONPATH=tests python tests/test_documents.py"


def test_contributing_names_files_that_exist() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where to change what")[2].partition("## Rules")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 20
    for row in rows:
        paths = re.findall(r"`([\w/.]+)`", row)
        assert paths, row
        for path in paths:
            inside = path if "/" in path else f"{Path(paths[0]).parent}/{path}"
            assert (ROOT / inside).exists(), path


if __name__ == "__main__":
    before, _, rest = SERVICE.read_text().partition(BEGIN)
    SERVICE.write_text(f"{before}{BEGIN}\n\n{settings_table()}\n\n{END}{rest.partition(END)[2]}")
