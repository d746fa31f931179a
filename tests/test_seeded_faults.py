"""The seeded faults can still be seeded; `seeded_faults.py` itself checks that the tests catch each of them."""

import shutil

import pytest
from seeded_faults import FAULTS, REPOSITORY


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_seeded(fault, tmp_path):
    shutil.copytree(REPOSITORY / "modeling_visualchat", tmp_path / "modeling_visualchat")
    fault.seed(tmp_path)
    with pytest.raises(ValueError, match="update the fault"):
        fault.seed(tmp_path)
