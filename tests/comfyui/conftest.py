import pytest
from comfyui.pack import Bench


@pytest.fixture(scope="session")
def bench(comfyui):
    return Bench(comfyui)
