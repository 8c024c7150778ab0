"""`python -m hpo.dashboard PORT`: what a search starts beside itself."""

import sys

from hpo.dashboard.server import main
from hpo.redaction import safe_streams

with safe_streams():
    main(int(sys.argv[1]))
