"""deploy/prometheus/rules/*.yml as one PrometheusRule: `python -m deploy.kubernetes.prometheus_rule` writes it.

Kustomize can put a file into a ConfigMap, but not into a field of another kind.
"""

from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
RULES = HERE.parent / "prometheus" / "rules"
WRITTEN = HERE / "components" / "monitoring" / "prometheusrule.yaml"
HEAD = "# Made of deploy/prometheus/rules by `python -m deploy.kubernetes.prometheus_rule`: change those, and run it.\n"


def manifest() -> str:
    """The YAML text. Its groups are those of the files, in the files' order."""
    groups = [group for file in sorted(RULES.glob("*.yml")) for group in yaml.safe_load(file.read_text())["groups"]]
    name, labels = "parchgrad", {"app.kubernetes.io/name": "parchgrad"}
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": name, "namespace": name, "labels": labels},
        "spec": {"groups": groups},
    }
    return HEAD + yaml.safe_dump(rule, sort_keys=False, width=1000, allow_unicode=True)


if __name__ == "__main__":
    WRITTEN.write_text(manifest())
