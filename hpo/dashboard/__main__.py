"""`python -m hpo.dashboard PORT`: what a search starts beside itself."""

import sys

from hpo.dashboard.beside import main

main(int(sys.argv[1]))
