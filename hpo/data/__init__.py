"""Data sets: sources, splits, decoding and caches. No torch."""
