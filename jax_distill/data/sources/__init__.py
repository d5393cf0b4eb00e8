"""Captioned pictures as people keep them, one file a kind, behind the interface of `source.py`."""
