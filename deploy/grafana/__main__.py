"""`python -m deploy.grafana` writes deploy/grafana/dashboards/*.json."""

from deploy.grafana.write import write

if __name__ == "__main__":
    for path in write():
        print(path.name, path.stat().st_size, "bytes")
