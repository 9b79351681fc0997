"""Tarsia: small trained pieces, inlaid into a frozen vision-language model."""

__version__ = "0.7.0"

__all__ = ["__version__"]
