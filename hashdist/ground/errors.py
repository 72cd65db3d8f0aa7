"""Errors, told apart by what the caller does next.

Every message says what was required, what was found, where, and what to do. `exit_code` is what the
command line returns: 2 for input the caller can mend, 1 for anything else.
"""


class HashdistError(Exception):
    """Base of every error that hashdist raises on purpose."""

    exit_code = 1


class InvalidInput(HashdistError, ValueError):
    """The call or its data is wrong: mend it and call again."""

    exit_code = 2


class NotFound(HashdistError, LookupError):
    """What was named does not exist: name another, or make it first."""

    exit_code = 2


class AlreadyExists(HashdistError):
    """What was to be created is there already: open it, or choose another name."""

    exit_code = 2


class Conflict(HashdistError):
    """Another writer committed first: re-read, rebase, try again."""


class Refused(HashdistError):
    """The gate did not pass: what was proposed waits as a candidate. Mend the cause, promote it, or discard it."""


class OutcomeUnknown(HashdistError):
    """A write may or may not have landed: re-read to learn which, delete nothing."""


class Unavailable(HashdistError):
    """The store does not answer now: wait and try again."""


class Corrupt(HashdistError):
    """Bytes do not match their checksum or their format: stop, never retry."""
