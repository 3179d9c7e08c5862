"""What goes wrong with data and is not the program's fault."""


class DataError(ValueError):
    """One sentence for the user: what is wrong with the data, where, and what to do."""


class SourceUnreachable(DataError):
    """The source may be as the recipe says, but cannot be asked from here: no network, no access, or no answer."""
