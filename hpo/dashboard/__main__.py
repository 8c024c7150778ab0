"""`python -m hpo.dashboard PORT`: the subprocess of `hpo run --dashboard`."""

import sys

from hpo.dashboard.server import main
from hpo.redaction import safe_streams

with safe_streams():
    main(int(sys.argv[1]))
