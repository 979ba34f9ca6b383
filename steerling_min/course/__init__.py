"""Exercises and modifications, run by python -m steerling_min.course."""
