"""The only thing that crosses between training, merging and serving: an adapter as a value, and its files."""

from tarsia.adapter.files import load, recorded, save
from tarsia.adapter.fingerprint import Fingerprint
from tarsia.adapter.four_bits import FourBits, Quantisation
from tarsia.adapter.host import Host, Outline, native_bf16, open_base, open_outline
from tarsia.adapter.proof import Probe, probe, prove
from tarsia.adapter.resolution import resolution_of
from tarsia.adapter.value import Adapter, Patched, put

__all__ = [
    "Adapter",
    "Fingerprint",
    "FourBits",
    "Host",
    "Outline",
    "Patched",
    "Probe",
    "Quantisation",
    "load",
    "native_bf16",
    "open_base",
    "open_outline",
    "probe",
    "prove",
    "put",
    "recorded",
    "resolution_of",
    "save",
]
