"""`python -m hpo`, the same as `hpo`."""

from hpo.cli.main import main

if __name__ == "__main__":
    main()
