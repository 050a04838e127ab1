"""What the README shows is run as it stands, against the stack of the tests."""

import re
import subprocess
import sys

from tests.support.servers import ROOT


def test_the_sdk_example_runs(stack, admin_key, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "lamplighter-data").mkdir()
    (tmp_path / "lamplighter-data" / "admin.key").write_text(admin_key)
    assert "http://127.0.0.1:8000" in code
    done = subprocess.run(
        [sys.executable, "-c", code.replace("http://127.0.0.1:8000", stack.url)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Good evening") == 3


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
