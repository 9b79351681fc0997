"""How the rows of a table become conversations: one reader for each format, found by its columns."""

from tarsia.data.formats import chats, conversations, pairs  # noqa: F401 (each registers its formats)
from tarsia.data.formats.registry import FORMATS, Format, Place, Reader, Row, read_row, row_format

__all__ = ["FORMATS", "Format", "Place", "Reader", "Row", "read_row", "row_format"]
