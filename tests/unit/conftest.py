"""What all unit tests share."""

from hypothesis import settings

settings.register_profile("busy", deadline=None)  # a machine that does much else is no fault of a test
settings.load_profile("busy")
