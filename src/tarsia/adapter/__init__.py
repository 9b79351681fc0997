"""The only thing that crosses between training, merging and serving: an adapter as a value, and its files."""

from tarsia.adapter.files import load, save
from tarsia.adapter.fingerprint import Fingerprint
from tarsia.adapter.host import Host, native_bf16, open_base
from tarsia.adapter.proof import Probe, probe, prove
from tarsia.adapter.value import Adapter, Patched, put

__all__ = [
    "Adapter",
    "Fingerprint",
    "Host",
    "Patched",
    "Probe",
    "load",
    "native_bf16",
    "open_base",
    "probe",
    "prove",
    "put",
    "save",
]
