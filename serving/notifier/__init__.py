"""Alerts from their topic to HTTP endpoints, as Standard Webhooks or Alertmanager have it; docs/alerts.md."""
