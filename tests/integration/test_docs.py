"""What README and docs show is run as it stands: every block of commands or code, against the stack of the tests."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import make_tiny_llama, make_trunk
from tests.support.servers import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(
    r"^(?:<!-- run by (?P<by>[^>]+?) -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
RUN_HERE = {"sh", "python", "javascript"}
DATA = {"text", "yaml", "json", "jsonl"}
"""What shows and is not run: drawings and files. Of YAML, a file whose first line is `# FILE: COMMAND` is run with it."""
FILE = re.compile(r"# (?P<name>[\w.-]+): (?P<command>lamplighter [^,\n]+)")


def blocks(page):
    return [match.groupdict() for match in BLOCK.finditer(page.read_text())]


def test_every_block_is_run_or_says_what_runs_it():
    for page in PAGES:
        for block in blocks(page):
            name = f"{page.relative_to(ROOT)}: {block['text'][:60]!r}"
            assert block["kind"] in RUN_HERE | DATA | {"console"}, f"{name} has no kind"
            if block["by"] is None:
                is_shown = block["kind"] in DATA or page.parent.name == "reference"
                assert is_shown or is_run_here(block), f"{name} is run by nothing"
            else:
                for part in re.findall(r"`([^`]+)`", block["by"]):
                    assert is_known(part), f"{name} says that {part} runs it"


def is_known(name):
    """Whether there is such a make target, or such a test (FILE::TEST)."""
    if name.startswith("make "):
        return f"\n{name.removeprefix('make ')}:" in (ROOT / "Makefile").read_text()
    file, _, test = name.partition("::")
    return (ROOT / file).is_file() and (not test or f"def {test}(" in (ROOT / file).read_text())


def is_run_here(block):
    is_file = block["kind"] == "yaml" and FILE.match(block["text"])
    return block["by"] is None and (block["kind"] in RUN_HERE or bool(is_file))


RUNNABLE = [page for page in PAGES if any(map(is_run_here, blocks(page)))]


@pytest.fixture(scope="module")
def place(stack, admin_key, native, tmp_path_factory):
    """A directory as a reader has it: the key of `lamplighter up`, and two models that an admin registered."""
    directory = tmp_path_factory.mktemp("reader")
    (directory / "lamplighter-data").mkdir()
    (directory / "lamplighter-data" / "admin.key").write_text(admin_key)
    models = {"my-model": make_tiny_llama(directory / "llama"), "my-encoder": make_trunk("bert", directory / "bert")}
    for name, source in models.items():
        native.request("POST", "/v1/models", json={"name": name, "source": str(source)})
    (directory / "examples.jsonl").write_text((json.dumps({"prompt": "Lamp?", "completion": "On."}) + "\n") * 20)
    rows = [{"text": f"lamp {i}", "topic": "ab"[i % 2], "tags": ["x"] * (i % 2), "words": i % 5} for i in range(40)]
    for name in ("rows.jsonl", "held-out.jsonl"):
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_blocks_run(page, place, stack, admin_key):
    own = {"LAMPLIGHTER_URL": stack.url, "LAMPLIGHTER_API_KEY": admin_key}
    own["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    missing = set()
    for block in filter(is_run_here, blocks(page)):
        text = block["text"].replace("http://127.0.0.1:8000", stack.url)
        if block["kind"] == "yaml":
            file = FILE.match(text)
            (place / file["name"]).write_text(text)
            text = file["command"]
        command = COMMANDS[block["kind"]]
        if shutil.which(command[0]) is None:
            missing.add(command[0])
            continue
        done = subprocess.run(
            [*command, text], cwd=place, env=os.environ | own, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        assert done.stdout.strip(), f"{text}\nsaid nothing"
    if missing:
        pytest.skip(f"all but what needs {', '.join(missing)} was run")


SHELL = ["bash", "-euo", "pipefail", "-c"]
COMMANDS = {
    "sh": SHELL,
    "yaml": SHELL,
    "python": [sys.executable, "-W", "ignore::ResourceWarning", "-c"],
    "javascript": ["node", "--input-type=module", "-e"],
}
