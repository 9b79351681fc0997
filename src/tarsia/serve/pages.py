"""Adapters as pages: fetched ahead, pinned while in use, given up when there is no room."""

from __future__ import annotations

from tarsia.serve.page import Page

__all__ = ["Page"]
