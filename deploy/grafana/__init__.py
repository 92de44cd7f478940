"""Baton's dashboards for Grafana 10 and later, described in Python and committed as JSON.

panels        what a panel shows: queries, unit, thresholds, and the JSON that Grafana wants for it
dashboard     rows of panels, variables and links of one dashboard, laid out
promql        the few shapes that queries have
overview, router, prefill, transfer, decode      the five dashboards; workers has what two of them share
build         `python -m deploy.grafana.build` writes dashboards/*.json
"""
