"""The exporter: what is in front of every teacher and in every run, for Prometheus and for autoscalers."""
