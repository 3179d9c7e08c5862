"""What goes wrong with data and is not the program's fault."""


class DataError(ValueError):
    """One sentence for the user: what is wrong with the data, where, and what to do."""


class SourceUnreachable(DataError):
    """The source could not be asked (no network, no access): it may be right all the same."""
