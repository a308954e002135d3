"""The subcommands of `colintern`, one module each; see colintern/cli.py."""
