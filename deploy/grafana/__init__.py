"""The Grafana dashboards' source: `python -m deploy.grafana` writes dashboards/*.json from it."""
