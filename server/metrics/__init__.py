"""/metrics: what the api measures itself, and the coordinator's counters as metric families."""
