"""The real optuna-dashboard over our storage, behind a door of ours.

    serve.py         the address; server.py: waitress and its limits
    beside.py        the process beside a search
    door.py          every request comes through here: who, from where, and what it may do
    rules.py         what the door decides from a request's text alone
    request.py       a request as plain data
    credentials.py   the password and the token
    sessions.py      who is logged in; attempts.py: who has to wait
    answers.py       answers, their headers, their compression
    house.py         optuna-dashboard over a database, never with an old study under a new id

The first request of a stranger goes no further than door.py.
"""
