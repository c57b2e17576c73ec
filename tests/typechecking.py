"""The checker that the suite runs every annotation of the package under (see conftest.py)."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

# As PEP 484 has it, an int is taken where a float is asked for.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
