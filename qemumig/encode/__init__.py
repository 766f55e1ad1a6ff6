"""Pure functions from bytes to bytes: no guest, no socket, no thread.

zero    is this page all zeroes?
"""
