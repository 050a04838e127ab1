"""One extra per service; only the engine pulls torch; no pickle anywhere."""

import ast
import re
import sys
import tomllib
from importlib.metadata import requires

import pytest

from tests.support.servers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def name_of(requirement):
    return re.match(r"[A-Za-z0-9._-]+", requirement).group().lower().replace("_", "-")


def closure(requirements):
    """Return all that these requirements pull in, by the metadata of what is installed."""
    found, waiting = set(), [r for r in requirements]
    while waiting:
        requirement = waiting.pop()
        name = name_of(requirement)
        if name in found or "extra ==" in requirement:
            continue
        found.add(name)
        try:
            waiting += [r for r in requires(name) or [] if "extra ==" not in r]
        except ModuleNotFoundError:
            continue  # for another platform
    return found


@pytest.mark.parametrize("service", ["gateway", "scheduler", "worker"])
def test_no_service_but_the_engine_pulls_torch(service):
    pulled = closure(PROJECT["dependencies"] + PROJECT["optional-dependencies"][service])
    assert not pulled & {"torch", "transformers", "sentence-transformers"}
    assert len(pulled) > 10


def test_the_engine_does():
    assert "torch" in closure(PROJECT["optional-dependencies"]["engine"])


def test_every_direct_dependency_is_pinned_and_locked():
    lock = {name_of(line): line for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line}
    extras = [r for group in PROJECT["optional-dependencies"].values() for r in group]
    for requirement in PROJECT["dependencies"] + extras:
        if requirement.startswith("lamplighter-server"):
            continue
        assert "==" in requirement, requirement
        name, version = name_of(requirement), requirement.split("==")[1]
        assert lock[name].split("==")[1] == version, requirement


def test_nothing_imports_pickle():
    for root in ("services", "shared", "client", "migrations"):
        for path in (ROOT / root).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = (
                    [a.name for a in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or ""]
                    if isinstance(node, ast.ImportFrom)
                    else []
                )
                assert not {"pickle", "cloudpickle", "dill", "marshal", "shelve"} & {n.split(".")[0] for n in names}, (
                    path
                )


def test_torch_free_modules_import_without_torch():
    import subprocess

    modules = [
        "services.gateway.app",
        "services.scheduler.main",
        "services.worker.worker",
        "services.worker.launcher",
        "services.worker.engine.process",
        "lamplighter.cli",
    ]
    code = "import sys; " + "; ".join(f"import {m}" for m in modules) + "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT)
