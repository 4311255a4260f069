"""Pages run one after the other in one process."""

import sys

import pytest


@pytest.fixture(autouse=True)
def fresh_caches():
    """Modules of the pages stay imported between tests; what they cached must not.

    AppTest leaves the page behind as `__main__`, which processes started by later tests would run."""
    import streamlit as st

    main_module = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = main_module
    st.cache_data.clear()
    st.cache_resource.clear()
