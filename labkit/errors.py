"""The one exception of labkit's own."""


class LabkitError(Exception):
    """The machine or a file is at fault, not the caller: a damaged model, a full disk, no network.

    The message is one line that names the thing, what was found, and the next step. A caller's
    mistake is a `ValueError` in the same form.
    """
