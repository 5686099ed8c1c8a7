"""Test that the commands in the README and the documentation are valid, without running them."""

from __future__ import annotations

from collections import Counter

import click
import pytest

from tests.conftest import ROOT
from tests.helpers.documented_programs import OURS, UNCHECKED_NAMES, Block, programs
from tests.helpers.shell import fenced_blocks, split_commands

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
#: Languages of the blocks that contain no commands. Those of the first two show output and diagrams.
OTHER_LANGUAGES = {"", "text", "mermaid", "nginx", "python", "toml", "yaml"}


def _check(page: str, text: str) -> tuple[Counter[str], list[str]]:
    """Return how often a page has each command, and a message for each command that is wrong."""
    names: Counter[str] = Counter()
    faults: list[str] = []
    for line, language, content in fenced_blocks(text):
        block = Block()
        for command in split_commands(content, line) if language == "sh" else ():
            try:
                names[block.check(command)] += 1
            except click.ClickException as error:
                faults.append(f"{page}:{command.line}: {' '.join(command.words)}: {error.format_message()}")
    return names, faults


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```sh" in text])
def test_every_command_of_a_page_is_valid(page: str) -> None:
    names, faults = _check(page, PAGES[page])
    assert names or faults
    assert not faults, "\n".join(faults)


def test_the_commands_are_found_and_every_program_of_the_table_is_used() -> None:
    names: Counter[str] = sum((_check(page, text)[0] for page, text in PAGES.items()), Counter())
    assert names.total() >= 100
    assert sum(count for name, count in names.items() if name.startswith(tuple(OURS))) >= 35
    assert names["docker build"] >= 12
    assert names["kubectl apply"] >= 10
    assert names["make"] >= 4
    assert not UNCHECKED_NAMES - names.keys(), "remove these from the table"


@pytest.mark.parametrize("page", PAGES)
def test_a_block_without_a_shell_has_no_commands(page: str) -> None:
    known = {name.split()[0] for name in (*OURS, *UNCHECKED_NAMES, *programs.commands)}
    for line, language, content in fenced_blocks(PAGES[page]):
        if language == "sh":
            continue
        assert language in OTHER_LANGUAGES, f"{page}:{line - 1}: write commands in blocks of the language sh"
        if language in {"", "text"}:
            first_words = {words[0].lstrip("($") for words in map(str.split, content.splitlines()) if words}
            assert not known & first_words, f"{page}:{line}: a block with commands needs the language sh"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("chatterbox-prewarm bake --gpu", "No such option '--gpu'"),
        ("chatterbox-prewarm bakes", "No such command 'bakes'"),
        ("chatterbox-prewarm weights fetch", "Missing argument"),
        ("chatterbox-prewarm bake --profile fast", "'fast' is not one of"),
        ("chatterbox-prewarm build --tag a --build-arg WEIGHT=hub", "Dockerfile has no build argument WEIGHT"),
        ("_CHATTERBOX_PREWARM_COMPLETE=csh_source chatterbox-prewarm", "there is no completion for csh_source"),
        ("python -m chatterbox_prewarm fact", "No such command 'fact'"),
        ("python -m benchmarks pods --round 3 --output pods.json", "No such option '--round'"),
        ("python -m nothing", "has the program python -m nothing"),
        (".venv/bin/python -m pytest tests/no_test.py", "the path tests/no_test.py does not exist"),
        ("make dem", "the Makefile has no target dem"),
        ("make demo VARIANTS=turbo", "the Makefile has no variable VARIANTS"),
        ("docker build --build-arg VARIANTS=turbo -t a .", "Dockerfile has no build argument VARIANTS"),
        ("docker build -f docs/examples/ray.Dockerfile --build-arg GPU=a -t a .", "has no build argument GPU"),
        ("docker build --target lean -t a .", "Dockerfile has no stage lean"),
        ("docker build -f Dockerfile.gpu -t a .", "the path Dockerfile.gpu does not exist"),
        ("docker run --rm chatterbox:warm serve --no-port", "No such option '--no-port'"),
        ("docker compose up", "the path compose.yaml does not exist"),
        ("docker pulls a", "No such command 'pulls'"),
        ("kubectl apply -k k8s/overlays/none", "the path k8s/overlays/none does not exist"),
        ("kubectl apply -k k8s/overlays", "the path k8s/overlays/kustomization.yaml does not exist"),
        ("kubectl apply -f nodes.json", "the path nodes.json does not exist"),
        ("kubectl exec POD -- python -m chatterbox_prewarm facts --all", "No such option '--all'"),
        ("helm install speech charts/speech", "the path charts/speech does not exist"),
        ("cd compose\ncp missing.env .env", "the path missing.env does not exist"),
        ("mak demo", "has the program mak"),
        ("pip install . && mak demo", "has the program mak"),
        ('curl "$(mak demo)" | tar -x', "has the program mak"),
    ],
)
def test_a_wrong_command_is_found(script: str, message: str) -> None:
    _, faults = _check(
        "page.md", f"# A page\n\n- an item:\n\n  ```sh\n  {script.replace(chr(10), chr(10) + '  ')}\n  ```\n"
    )
    (fault,) = faults
    assert fault.startswith(f"page.md:{6 + script.count(chr(10))}: ")
    assert message in fault


def test_a_path_is_valid_in_the_working_directory_or_after_a_command_that_writes_it() -> None:
    script = (
        "chatterbox-prewarm k8s render --image a/b:1 > new.yaml\nkubectl apply -f new.yaml\ncd compose\ncp gpu.yaml ."
    )
    assert not _check("page.md", f"```sh\n{script}\n```\n")[1]
    assert len(_check("page.md", f"```sh\n{script}\n```\n```sh\nkubectl apply -f new.yaml\n```\n")[1]) == 1


def test_commands_are_split_as_a_shell_does() -> None:
    script = """# a comment that isn't a command
A=1 B='x y' one --a "b c" \\
    --d | two > out.json && three   # another one's
four |
    five < in.txt
(six; seven 'a
b') & cat <<'END' > file
not a command
END
C=$(eight) nine "$(ten | eleven)"
"""
    found = [(command.line, command.words) for command in split_commands(script)]
    assert found == [
        (2, ["one", "--a", "b c", "--d"]),
        (2, ["two"]),
        (2, ["three"]),
        (4, ["four"]),
        (4, ["five"]),
        (6, ["six"]),
        (6, ["seven", "a\nb"]),
        (6, ["cat"]),
        (10, ["eight"]),
        (10, ["ten"]),
        (10, ["eleven"]),
        (10, ["nine", "$(ten | eleven)"]),
    ]


@pytest.mark.parametrize("script", ["one 'two", "one |", "cat <<END\ntext"])
def test_a_script_without_an_end_is_invalid(script: str) -> None:
    with pytest.raises(ValueError, match="has no end"):
        list(split_commands(script))
