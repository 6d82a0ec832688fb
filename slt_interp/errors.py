"""The one exception that means "what you gave cannot be used": the command line shows it in one line and exits with 2."""


class InputError(ValueError):
    """A value was given that cannot be used; the message says what was expected and how to mend it."""
