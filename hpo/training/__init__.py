"""Training: images, models, optimizers, one generator. Knows neither Optuna nor the database."""
