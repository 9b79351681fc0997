"""Conversations with pictures: read, mixed, and made into batches with labels on the answers only."""

from tarsia.data.chat import Rendered, Template
from tarsia.data.encode import IGNORED, Batch, Encoder
from tarsia.data.formats import FORMATS, Format, Place, read_row, row_format
from tarsia.data.mixture import Mixture, Share
from tarsia.data.samples import PICTURE, ROLES, Call, Message, Picture, Placeholder, Sample
from tarsia.data.sources import Rows, Source, read
from tarsia.data.tables import Table

__all__ = [
    "FORMATS",
    "IGNORED",
    "PICTURE",
    "ROLES",
    "Batch",
    "Call",
    "Encoder",
    "Format",
    "Message",
    "Mixture",
    "Picture",
    "Place",
    "Placeholder",
    "Rendered",
    "Rows",
    "Sample",
    "Share",
    "Source",
    "Table",
    "Template",
    "read",
    "read_row",
    "row_format",
]
