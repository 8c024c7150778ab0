"""Processes that run trials, and the one that keeps them alive."""
