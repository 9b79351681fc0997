"""Files laid out as CIFAR-10's are, with tiny drawn photographs."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from data.processors import picture
from PIL import Image

from tarsia.base.pictures import PHOTOGRAPHS


def png(shown: Image.Image) -> bytes:
    held = io.BytesIO()
    shown.save(held, "PNG")
    return held.getvalue()


def photographs(path: Path, count: int) -> Path:
    """``count`` photographs of 32 x 32 pixels, their labels in turn."""
    shots = [png(picture(shade=7 * i + 1).resize((32, 32))) for i in range(count)]
    labels = [PHOTOGRAPHS[i % len(PHOTOGRAPHS)] for i in range(count)]
    pq.write_table(pa.table({"image": [{"bytes": shot} for shot in shots], "label": labels}), path)
    return path
