"""Tarsia: small trained pieces, inlaid into a frozen vision-language model."""

__version__ = "0.6.0"

__all__ = ["__version__"]
