"""`hpo storage check`: rules, repairs, and files on disk."""
