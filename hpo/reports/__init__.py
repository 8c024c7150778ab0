"""Reports: figures and offline pages of studies and trained runs."""
