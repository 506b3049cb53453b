"""Alveole runs many isolated services on few machines."""

__version__ = "0.1.0"
