"""The command lines of the smaller commands."""

import argparse

from sae_separation.errors import WrongRequest


class Parser(argparse.ArgumentParser):
    """Shows its description as it is written. Raises WrongRequest for what it does not take."""

    def __init__(self, prog: str, description: str | None):
        how = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=how)

    def error(self, message: str):
        raise WrongRequest(f"{message} (--help lists the options)")
