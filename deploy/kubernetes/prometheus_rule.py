"""deploy/prometheus/rules/*.yml as PrometheusRules of components: `python -m deploy.kubernetes.prometheus_rule`.

Kustomize can put a file into a ConfigMap, but not into a field of another kind.
"""

from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
RULES = HERE.parent / "prometheus" / "rules"
COMPONENTS = HERE / "components"
# Component -> the files in its rule. Names of other servers are apart: beside those servers they would mix with theirs.
FILES = {
    "monitoring": ("alerts.yml", "recording.yml"),
    "kserve-names": ("kserve_names.yml",),
    "triton-names": ("triton_names.yml",),
}
HEAD = "# Made of deploy/prometheus/rules by `python -m deploy.kubernetes.prometheus_rule`: change those, and run it.\n"


def written(component: str) -> Path:
    return COMPONENTS / component / "prometheusrule.yaml"


def manifest(component: str) -> str:
    """The YAML text. Its groups are those of the files, in FILES' order."""
    groups = [group for file in FILES[component] for group in yaml.safe_load((RULES / file).read_text())["groups"]]
    name, labels = "parchgrad", {"app.kubernetes.io/name": "parchgrad"}
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {
            "name": name if component == "monitoring" else f"{name}-{component}",
            "namespace": name,
            "labels": labels,
        },
        "spec": {"groups": groups},
    }
    return HEAD + yaml.safe_dump(rule, sort_keys=False, width=1000, allow_unicode=True)


if __name__ == "__main__":
    for one in FILES:
        written(one).write_text(manifest(one))
