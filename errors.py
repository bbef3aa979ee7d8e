"""How a command ends when it does not end well; each is one line for the user, last on stderr."""


class WrongRequest(Exception):
    """What was asked cannot be done as asked: one line, exit code 2, nothing written."""


class RunFailed(Exception):
    """A run that began and cannot go on: one line, exit code 1, no final_info.json."""
