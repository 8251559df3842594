"""What runs the service elsewhere and watches it: container, Prometheus, Grafana, Kubernetes."""
