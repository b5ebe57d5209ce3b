"""Settings of all tests."""

from hypothesis import settings

# The same examples in every run: a test that fails, fails for everybody. No deadline per example: machines
# are shared. To search further, raise `max_examples` and unset `derandomize` for a while.
settings.register_profile("outrider", deadline=None, derandomize=True)
settings.load_profile("outrider")
