"""The command line: one file for each command; `app` puts them together."""

from memfit.cli.app import main as main
