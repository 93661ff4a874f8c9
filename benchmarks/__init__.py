"""headway beside its peers: `python -m benchmarks`."""
