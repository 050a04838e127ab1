"""OpenAI's SDK for Node, unmodified, against the stack."""

import json
import os
import shutil
import subprocess

import pytest

from tests.support.servers import ROOT

NODE_MODULES = ROOT / "build" / "node"


@pytest.fixture(scope="module")
def suite():
    """Install the pinned SDK once, outside the sources; return the script's path."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    NODE_MODULES.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json", "suite.mjs"):
        shutil.copy(ROOT / "tests" / "node" / name, NODE_MODULES / name)
    subprocess.run(["npm", "ci", "--silent", "--no-audit", "--no-fund"], cwd=NODE_MODULES, check=True, timeout=240)
    return NODE_MODULES / "suite.mjs"


def test_the_node_sdk(suite, stack, admin_key):
    environment = os.environ | {"OPENAI_BASE_URL": f"{stack.url}/v1", "OPENAI_API_KEY": admin_key}
    done = subprocess.run(["node", suite], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert "echo" in seen.pop("models")
    assert seen == {
        "chat": ["one two", "length", 5],
        "streamed": ["one", " two", " three"],
        "usage": 3,
        "completions": ["a b", "c"],
        "embeddings": [8, 8],
        "model": "model",
        "file": [True, "batch"],
        "batch": ["completed", 5, "node"],
        "output": [f"line-{i}" for i in range(5)],
        "deleted": True,
        "error": ["NotFoundError", 404, "model_not_found"],
    }
