"""The subcommands of `colintern`, one module each; see colintern/__main__.py."""
