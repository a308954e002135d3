"""Train, evaluate and compare ColIntern3.5 visual document retrievers."""

__version__ = "0.1.0"
