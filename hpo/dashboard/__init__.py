"""optuna-dashboard over hpo's storage, behind a gateway.

    server.py    the address: waitress, its limits, the subprocess of a search
    gateway.py   every request: who sends it, from where, and what it may do
    auth.py      the password and the token, sessions, the login throttle
    app.py       optuna-dashboard over a database, never with an old study under a new id

A request without a login goes no further than gateway.py.
"""
