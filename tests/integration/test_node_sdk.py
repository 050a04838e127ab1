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
        assert "LAMPLIGHTER_COMPOSE" not in os.environ, (
            "the deployment is judged by Node's SDK too: install node and npm"
        )
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
        "streamedCompletion": {"text": ["a b", "c"], "reasons": ["stop", "stop"]},
        "embeddings": [[8, 8], "string"],
        "embeddingsAgree": True,
        "model": ["echo", "model", "lamplighter"],
        "file": [True, "batch", "processed"],
        "retrieved": [True, "in.jsonl", True],
        "content": True,
        "filesListed": [1, 1],
        "batch": ["completed", {"total": 5, "completed": 5, "failed": 0}, "node", None],
        "output": [[f"line-{i}", "one two three"] for i in range(5)],
        "wrong": ["completed", 2, None],
        "errors": [["line-0", 400], ["line-1", 400]],
        "batchesListed": [1, 1],
        "deleted": True,
        "gone": ["NotFoundError", 404, "not_found", "id", True],
        "cancelling": "cancelling",
        "cancelled": ["cancelled", True],
        "cancelledAgain": ["ConflictError", 409, "not_cancellable", None, True],
        "unauthorized": ["AuthenticationError", 401, "invalid_api_key", None, True],
        "noModel": ["NotFoundError", 404, "model_not_found", "model", True],
        "noBatch": ["NotFoundError", 404, "not_found", "id", True],
        "badRequest": ["BadRequestError", 400, "invalid_value", "temperature", True],
        "badStream": ["BadRequestError", 400, "invalid_value", "top_p", True],
        "badBatch": ["BadRequestError", 400, "invalid_value", "input_file_id", True],
    }
