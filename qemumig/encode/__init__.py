"""Pure functions from bytes to bytes: no guest, no socket, no thread.

zero    is this page all zeroes?
zlib_page  one page as a zlib stream of its own
xbzrle  what changed in a page since the other side last saw it
"""
