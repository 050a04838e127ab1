"""Alerts and dashboards: they name what there is, each alert fires on its trouble and is silent on a calm night."""

import json
import re
import shutil
import subprocess

import pytest
import yaml

from services.gateway.metrics import DESCRIPTIONS, PREFIX
from tests.support.servers import ROOT

RULES = yaml.safe_load((ROOT / "services/prometheus/alerts.yml").read_text())["groups"][0]["rules"]
CASES = yaml.safe_load((ROOT / "tests/monitoring/alerts_test.yml").read_text())["tests"]
DASHBOARD = json.loads((ROOT / "services/grafana/dashboards/lamplighter.json").read_text())
NAMED = re.compile(PREFIX + r"(\w+)(?:\{([^}]*)\})?")


def test_each_alert_fires_on_its_trouble_and_not_on_a_calm_night():
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    done = subprocess.run(
        ["promtool", "test", "rules", "tests/monitoring/alerts_test.yml"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_both_ways():
    fires = {test["alertname"] for case in CASES for test in case["alert_rule_test"] if test.get("exp_alerts")}
    silent = {test["alertname"] for case in CASES for test in case["alert_rule_test"] if not test.get("exp_alerts")}
    assert fires == silent == {rule["alert"] for rule in RULES}


def test_every_alert_says_what_to_do():
    for rule in RULES:
        assert rule["labels"]["severity"] in ("page", "look"), rule
        assert rule["annotations"].keys() == {"summary", "action"}, rule


def expressions():
    yield from ((rule["alert"], rule["expr"]) for rule in RULES)
    yield from ((panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"])


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_only_metrics_that_there_are_are_asked_for(where, expression):
    for name, labels in NAMED.findall(expression):
        known = DESCRIPTIONS.get(name) or DESCRIPTIONS[name.removesuffix("_bucket")]
        assert name.endswith("_bucket") == (known.type == "histogram"), name
        asked = set(re.findall(r"(\w+)=", labels))
        assert asked <= set(known.labels), (where, name)
    grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}
    has = {
        label for name, _ in NAMED.findall(expression) for label in DESCRIPTIONS[name.removesuffix("_bucket")].labels
    }
    assert grouped - {"le"} <= has, where


def test_every_metric_that_is_told_of_everywhere_has_a_panel():
    shown = {name.removesuffix("_bucket") for _, expression in expressions() for name, _ in NAMED.findall(expression)}
    rest = {"worker_batch_occupancy_ratio", "engine_steps_total", "engine_sequences", "engine_evicted_blocks_total"}
    assert set(DESCRIPTIONS) - shown == rest | {"engine_kv_cache_bytes"}
