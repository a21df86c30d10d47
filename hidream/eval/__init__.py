"""Evaluation: suites that generate, judge and count."""
