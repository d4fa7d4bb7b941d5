"""The version, for everyone who records it."""

__version__ = "0.1.0"
