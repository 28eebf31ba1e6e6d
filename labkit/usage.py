"""The parser of every command: bad usage is one line that says where help is, and exit status 2."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's, without the block of usage before an error."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse's, but what is left over is refused by the command that was given it."""
        found, left = super().parse_known_args(args, namespace)
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}")
        return found, left

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.split())
        self.exit(2, f"labkit: {line}; see `{self.prog} --help`\n")


def as_argument(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """The same reader of a text, whose ValueError argparse shows beside the argument's name."""

    def read_argument(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read_argument
