"""Adapters kept as carefully as code: immutable versions, integrity, provenance."""
