"""Prometheus's configuration for one Baton cluster, and the rules that dashboards and alerts rest on.

prometheus.yml  scrapes whatever the router's /targets names
rules           what is computed once (recording), and what somebody should look at (alerts)
build           `python -m deploy.prometheus.build` writes the rules for the Prometheus operator
"""
