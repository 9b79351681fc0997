"""The rules of `tarsia lint`, one file a subject. Importing this package registers them."""

from tarsia.data.lint.rules import answers, copies, pictures, plan, rows, tokens

__all__ = ["answers", "copies", "pictures", "plan", "rows", "tokens"]
