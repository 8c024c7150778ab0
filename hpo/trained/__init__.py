"""After the search: export, retrain, evaluate, predict, report."""
