"""What checks the annotations of our packages in tests (the import hook of conftest.py)."""

from beartype import BeartypeConf, beartype

# As for Python itself, an int is good where a float is expected.
typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
