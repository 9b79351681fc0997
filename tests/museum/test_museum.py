"""Every fault of the museum is refused or reported here, and its sound twin is not."""

from __future__ import annotations

import pytest
from museum.stages import FAULTS


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name, tmp_path):
    fault = FAULTS[name]
    folders = [tmp_path / part for part in ("sound", "faulty", "peer")]
    for folder in folders:
        folder.mkdir()
    told = fault.sound(folders[0])
    print()
    print("TARSIA", fault.faulty(folders[1], told))
    print("PEER  ", fault.observe(folders[2]))
