"""Which special tokens have to be seen in a model's text."""

from __future__ import annotations

from workers.parsing import reasoning
from workers.parsing.harmony import HarmonySplitter
from workers.parsing.tools import families

#: What parsers look for; all other control tokens stand for no text.
VISIBLE_SPECIALS = families.VISIBLE | reasoning.VISIBLE | HarmonySplitter.visible
