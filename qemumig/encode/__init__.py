"""Pure functions from bytes to bytes: no guest, no socket, no thread.

zero    is this page all zeroes?
xbzrle  what changed in a page since the other side last saw it
"""
