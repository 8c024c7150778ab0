"""Launchers: where workers are placed."""
