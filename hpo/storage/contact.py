"""Whether a process may say that another one is gone.

After an outage of the database, a sleep of the host or a jump of the database's clock all leases
have run out, and their owners are there. So whoever takes over an expired trial must itself have
been in touch with the database for one whole lease: in that time an owner would have renewed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Contact:
    """Since when a process has been in touch with the database, by the database's clock.

    A gap of more than half a lease breaks it. A shorter one leaves an owner, who renews four times
    in a lease, the time to do so: nobody who saw it may think that the owner is dead.
    """

    since: float = math.inf
    last: float = -math.inf

    def heard(self, now: float, lease_s: float) -> Contact:
        """The database answered, and its clock said `now`; threads may tell of it in any order."""
        unbroken = abs(now - self.last) <= lease_s / 2
        return Contact(self.since, max(self.last, now)) if unbroken else Contact(now, now)

    def spans(self, lease_s: float) -> bool:
        """Whether it is long enough to say that a lease which has run out was not renewed because
        its owner could not."""
        return self.last - self.since >= lease_s


NO_CONTACT = Contact()
