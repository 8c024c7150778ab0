"""Data sets, training and evaluation: images, models, optimizers, one generator of epochs. Knows
neither Optuna nor the database."""
