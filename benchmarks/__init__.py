"""Measurements: one file per op or workload, results with where they were measured in results/*.json."""
