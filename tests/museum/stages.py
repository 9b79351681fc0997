"""The museum's rooms, in the order of a user's way. Importing this fills ``FAULTS``."""

from museum import adapter_faults, attach_faults, data_faults, evaluation_faults, training_faults
from museum.fault import FAULTS

ROOMS = (attach_faults, adapter_faults, data_faults, training_faults, evaluation_faults)

__all__ = ["FAULTS", "ROOMS"]
