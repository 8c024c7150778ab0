"""Configuration: TOML in, validated plain data out, before anything runs; nothing heavy."""
