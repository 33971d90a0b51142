"""Measurements, their results and plots; run from the repository root."""
