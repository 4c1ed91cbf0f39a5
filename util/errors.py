"""The one error that a user is meant to read."""


class UserError(ValueError):
    """What a user can put right; `main_jit.py` prints it as one line: what was found, what was wanted, which flag to turn."""
