"""Starts the `vipbench` command, also as `python -m vipbench`."""

from vipbench.harness.system.console import interruptions_from_here_on


def main() -> None:
    """Import the command and give control to it."""
    interruptions_from_here_on()
    from vipbench.harness.cli import main as command

    command()


if __name__ == "__main__":
    main()
