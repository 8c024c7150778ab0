"""Objects that the commands of `hpo` call, and that `import hpo` gives."""
