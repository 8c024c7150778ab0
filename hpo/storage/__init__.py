"""The shared database: Optuna's storage, prepared and fenced, and our tables beside it."""
