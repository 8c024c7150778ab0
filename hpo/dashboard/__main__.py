"""`python -m hpo.dashboard PORT`: what a search starts beside itself."""

import sys

from hpo.dashboard.beside import main
from hpo.redaction import redacted_stderr

with redacted_stderr():
    main(int(sys.argv[1]))
