"""Held-out measurements: zero-shot, retrieval, probes, diagnostics."""
