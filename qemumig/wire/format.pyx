"""The numbers of the wire for Python: this module only makes the enums of format.pxd importable."""
